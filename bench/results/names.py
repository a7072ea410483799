"""Names that result files hold. An implementation, like a clock, has one name, on a CPU and on a GPU."""

BARE, STOCK, FAST = "bare frozen model", "stock PEFT", "mica.fast"
STOCK_16 = "stock PEFT, adapters in the base dtype"
LORA = "PEFT LoRA"
# Of the adapted layer: stock's adapters in the base dtype, since its default ones are slower
COMPILED, COMPILED_FAST = "stock PEFT, torch.compile", "mica.fast, torch.compile"
COMPILED_PLAIN = f"{COMPILED_FAST}, plain"
# Stock's default adapters, as Trainer runs a model with ``bf16=True``
AUTOCAST, AUTOCAST_FAST = "stock PEFT, autocast", "mica.fast, autocast"
# Plain PyTorch: an autograd.Function that rounds dA to the base dtype
ATEN = "aten control"
# Of host time: the driver returns at once from every launch.
PYTORCH, KERNELS = "mica.fast, PyTorch form", "mica.fast, kernels with a driver that launches nothing"
BY_DEFAULT = f"{KERNELS}, where they run by default"
PYTORCH_16, KERNELS_16 = (f"{name}, adapters in the base dtype" for name in (PYTORCH, KERNELS))
IN_GROUP = f"{KERNELS}, in a process group"
MERGED = "adapter merged"
FLOAT32 = "mica.fast, float32"
SVD = "torch.linalg.svd"
COPY = "copy"  # of as many bytes as a kernel moves, by PyTorch
CUBLAS = "cuBLAS"  # the same product by PyTorch
# What the memory-bound kernels compute
DOWN_A, DOWN_B, UP_B, GRAD_A = "h = x Aᵀ", "g = dy B", "y += h Bᵀ", "dA = gᵀ x"

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
NO_GRADIENT = "forward without gradient"


def of_form(word: str) -> str:
    """`mica.fast` where it takes this form of a layer (`mica.kernels.configs.Forms`); by default "split"."""
    return FAST if word == "split" else f"{FAST}, {word}"


# What a cell on an accelerator was timed by; a CPU has one clock, and no such axis.
WALL, DEVICE_TIME, GRAPH = "wall clock", "device time", "graph replay"
