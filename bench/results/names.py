"""Names that result files hold. An implementation, like a clock, has one name, on a CPU and on a GPU."""

BARE = "bare frozen model"
STOCK = "stock PEFT"
STOCK_16 = "stock PEFT, adapters in the base dtype"
FAST = "mica.fast"
FAST_NORMS = "mica.fast, norms recomputed"
LORA = "PEFT LoRA"
ATEN = "aten control"  # plain PyTorch: an autograd.Function that rounds dA to the base dtype

# Stock's adapters are in the base dtype here, because its default ones are slower.
COMPILED = "stock PEFT, torch.compile"
COMPILED_FAST = "mica.fast, torch.compile"
COMPILED_PLAIN = "mica.fast, torch.compile, plain"

# Host time
PYTHON = "mica.fast, reference path"  # from Python
KERNELS = "mica.fast, kernels with a driver that launches nothing"

# What shows how quiet the machine is
PRODUCT = "a product"
AGAIN = "the same again"

SVD = "torch.linalg.svd"
EIGH = "fp64 Gram, torch.linalg.eigh"  # of the smaller side, all eigenvectors, as Unsloth initialises

COPY = "copy"  # of as many bytes as a kernel moves, by PyTorch
CUBLAS = "cuBLAS"  # the same product by PyTorch
# What the memory-bound kernels compute
DOWN_A = "h = x Aᵀ"
DOWN_B = "g = dy B"
UP_B = "y += h Bᵀ"
GRAD_A = "dA = gᵀ x"

FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward + backward"
NO_GRADIENT = "forward without gradient"

# What a cell on an accelerator was timed by; on a CPU it is CPU time, and there is no such axis.
WALL = "wall clock"
DEVICE_TIME = "device time"
GRAPH = "graph replay"


def of_form(word: str) -> str:
    """`mica.fast` where it takes this form of a layer (`mica.kernels.configs.Forms`); by default "split"."""
    return FAST if word == "split" else f"{FAST}, {word}"
