"""Names that result files hold. An implementation, like a clock, has one name, on a CPU and on a GPU."""

BARE, STOCK, FAST = "bare frozen model", "stock PEFT", "mica.fast"
STOCK_16 = "stock PEFT, adapters in the base dtype"
LORA, COMPILED = "PEFT LoRA", "stock PEFT, torch.compile"
# Plain PyTorch: an autograd.Function that rounds dA to the base dtype
ATEN = "aten control"
# Forms that `mica.fast` takes only where a table has them as faster
FUSED, DESCRIPTOR = "mica.fast, fused", "mica.fast, fused by tensor descriptors"
MIXED = "mica.fast, skinny products by the vendor's library"
# Of host time: the driver returns at once from every launch.
PYTORCH, KERNELS = "mica.fast, PyTorch form", "mica.fast, kernels with a driver that launches nothing"
PYTORCH_16, KERNELS_16 = (f"{name}, adapters in the base dtype" for name in (PYTORCH, KERNELS))
MERGED = "adapter merged"
FLOAT32 = "mica.fast, float32"
SVD = "torch.linalg.svd"
COPY = "copy"  # of as many bytes as a kernel moves, by PyTorch
# What the memory-bound kernels compute
DOWN_A, DOWN_B, UP_B, GRAD_A = "h = x Aᵀ", "g = dy B", "y += h Bᵀ", "dA = gᵀ x"

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
NO_GRADIENT = "forward without gradient"

# What a cell on an accelerator was timed by; a CPU has one clock, and no such axis.
WALL, DEVICE_TIME, GRAPH = "wall clock", "device time", "graph replay"
