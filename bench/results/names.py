"""Names that result files hold. An implementation, like a clock, has one name, on a CPU and on a GPU."""

from collections.abc import Container, Mapping

BARE = "bare frozen model"
STOCK = "stock PEFT"
STOCK_16 = "stock PEFT, adapters in the base dtype"  # `autocast_adapter_dtype=False`
STOCK_UNCAST = "stock PEFT, inputs not cast"  # `peft.helpers.disable_input_dtype_casting`, under autocast
FAST = "mica.fast"
FAST_ACTIVATIONS = "mica.fast, norms saved"  # by `recompute="activations"`
LORA = "PEFT LoRA"
FAST_LORA = "mica.fast, LoRA"

# Stock's adapters are in the base dtype here, because its default ones are slower.
COMPILED = "stock PEFT, torch.compile"
COMPILED_FAST = "mica.fast, torch.compile"

# The axis "adapter" of a cell; results before plain LoRA ran here do not have it
MICA = "MiCA"
PLAIN_LORA = "LoRA"
DORA = "DoRA"

# Host time
PYTHON = "mica.fast, reference path"  # from Python
KERNELS = "mica.fast, kernels with a driver that launches nothing"

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


def checkpointed(name: str, share: float) -> str:
    """The name of a step with this share of its layers checkpointed."""
    if share == 0:
        return name
    return f"{name}, {'all' if share == 1 else share} layers checkpointed"


def stock(dtype: str, autocast: bool = False) -> list[str]:
    """PEFT by default and, where that is another one, in its best setting."""
    if autocast:
        return [STOCK, STOCK_UNCAST]
    return [STOCK] if dtype == "float32" else [STOCK, STOCK_16]


def best_stock(timed: Container[str]) -> str:
    """PEFT in its best setting, of what was timed."""
    return next((name for name in (STOCK_UNCAST, STOCK_16) if name in timed), STOCK)


def of_form(word: str) -> str:
    """`mica.fast` where it takes this form of `mica.kernels.configs.FORM_NAMES`; by default "split"."""
    return FAST if word == "split" else f"{FAST}, {word}"


# What a reader calls the value of an axis; of the others it is enough to see the value
_IN_WORDS = {
    "tokens": "{tokens} tokens",
    "sequence": "sequences of {sequence}",
    "out": "{out} x {in}",
    "features": "{features} features",
    "rank": "r = {rank}",
    "dropout": "dropout {dropout}",
    "autocast": "autocast to {autocast}",
}


def in_words(axes: Mapping[str, str | int]) -> str:
    """The name of a cell: as "layer, MiCA, 1024 tokens, 2048 x 2048, r = 16, bfloat16"."""
    words = [_IN_WORDS.get(axis, f"{{{axis}}}").format(**axes) for axis in axes if axis != "in"]
    return ", ".join(words)
