"""Every kernel with every configuration of its table, as the launches that would be made."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mica.kernels import configs
from mica.kernels.down_projection import down_projection
from mica.kernels.fused_linear import fused_linear
from mica.kernels.grad_a import grad_a
from mica.kernels.grad_magnitude import grad_magnitude
from mica.kernels.launching import Launch, PlannedCall
from mica.kernels.up_projection import up_projection_

TARGETS = tuple(configs.SHARED_MEMORY)
AMD = tuple(target for target in TARGETS if target.startswith("gfx"))  # 16-bit products only
DEFAULTS_ONLY = ("sm_89", "sm_120", *AMD)  # their other configurations are those of sm_80
RANKS = (16, 32, 64, 128, 256)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Dtype of x, of lora_A, of the product; ranks. fp16 is bf16's code but for one conversion; a 16-bit A is
# what a wide rank has from 2048 tokens on.
DTYPES = {
    "bf16": (BF16, FP32, BF16, RANKS),
    "bf16 A": (BF16, BF16, BF16, (32, 64, 128, 256)),
    "fp16": (FP16, FP32, FP16, (16,)),
    "fp32": (FP32, FP32, FP32, (16, 64, 256)),
    "bf16 in fp32": (BF16, FP32, FP32, (16, 64, 256)),
}


@dataclass
class Case:
    kernel: str
    label: str
    launch: Launch
    is_aligned: bool = True  # whether its accesses can be wide
    shifted: tuple[str, ...] = ()  # pointers that 16 does not divide
    load_bits: int = 128  # the narrowest load that a main loop may have
    few_loads: int = 4  # how many loads of any width a kernel without a main loop may have (seed, h)
    has_products: bool = True  # of matrices, on tensor cores
    few_stores: int = 0  # how many stores of any width it may have
    # Whether it was chosen for products of four warps, whose operands are loaded asynchronously
    is_asynchronous: bool = False
    is_quick: bool = True


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases(target: str) -> list[Case]:
    """All of them for one target."""
    found = [*_odd(target), *_sums(target)]
    for name, (*dtypes, ranks) in DTYPES.items():
        for rank in ranks:
            # the other dtypes and ranks with the default configuration only
            main = name == "bf16" and target not in DEFAULTS_ONLY
            for kernel, part, call, is_default in _calls(target, rank, *dtypes):
                every = main and (rank in (16, 64, 256) or kernel == "down_projection")
                if not _is_wanted(target, kernel, part, name, rank):
                    continue
                for config in call.configs if every and not is_default else call.configs[:1]:
                    label = f"{part} {name} r={rank} {tuple(config)}"
                    case = Case(kernel, label, call.bind(config)[1], load_bits=_load_bits(kernel, name))
                    # of the ends of rows, too; and of the bias, which Triton 3.5 and 3.6 load in the layout
                    # of the product: eight times two numbers
                    case.few_loads = 12 if kernel == "up of experts" else 4
                    case.is_asynchronous = case.launch.meta.get("X_FIRST", False)
                    case.is_quick = config == call.configs[0] and _is_quick(target, name, rank)
                    found.append(case)
                # what is fused gets aligned operands only
                if name == "bf16" and rank == 16 and "dropout" not in part and not kernel.startswith("fused"):
                    shifted = Case(kernel, f"{part} shifted", call.bind()[1], is_aligned=False)
                    shifted.shifted = ("x_ptr", "base_ptr")  # the user's; what we allocate is aligned
                    found.append(shifted)
    return found


def _is_wanted(target: str, kernel: str, part: str, name: str, rank: int) -> bool:
    is_fused = kernel.startswith("fused")
    if target in AMD and DTYPES[name][2] is FP32:
        return False
    if name == "bf16 A":
        return part == "A" and kernel in ("down_projection", "up_projection")
    if rank in (32, 128):
        return kernel == "down_projection" or (not is_fused and part in ("A", "B", ""))
    return not is_fused or name in ("bf16", "fp32")


def _is_quick(target: str, name: str, rank: int) -> bool:
    """One compiler and nearly the same tables: elsewhere the main dtype, at the smallest and largest rank."""
    if target in ("sm_80", "sm_90"):
        return name in ("bf16", "bf16 A", "fp32")
    return name == "bf16" and rank in (16, 256)


def _load_bits(kernel: str, name: str) -> int:
    """Copies to shared memory are as wide as its layout is contiguous, which the tensor cores choose: four
    numbers where 16-bit ones become fp32, one where fp32 ones are transposed (g, the small operand)."""
    if kernel.startswith("grad_a") and "fp32" in name:
        return 32
    return 64 if name == "bf16 in fp32" else 128


def _calls(target, rank, dtype, a_dtype, product) -> Iterator[tuple[str, str, PlannedCall, bool]]:
    """(kernel, which call, call, whether its default configuration is enough): a layer's, and experts'."""
    tokens, width, seed = 8192, 4096, empty(1, dtype=torch.int64)
    x, a = empty(tokens, width, dtype=dtype), empty(rank, width, dtype=a_dtype)
    b, h = empty(width, rank, dtype=product).t(), empty(tokens, rank, dtype=product)
    to, dropped = {"target": target}, {"target": target, "dropout_p": 0.1}
    by, shaped = {"compute_dtype": product}, {"rank": rank}
    yield "down_projection", "A", down_projection.plan(x, a, **by, **to), False
    yield "down_projection", "B", down_projection.plan(x, b, **by, **to), False
    yield "down_projection", "dropout", down_projection.plan(x, a, seed, **by, **dropped), True
    yield "down_projection", "split", down_projection.plan(x[:16], a, **by, **to), True
    yield "up_projection", "B", up_projection_.plan(x, h, b, **by, **to), False
    yield "up_projection", "A", up_projection_.plan(x, h, a, **by, **to), False
    yield "up_projection", "dropout", up_projection_.plan(x, h, a, seed, **by, **dropped), True
    yield "grad_a", "", grad_a.plan(h, x, **shaped, **to), False
    yield "grad_a", "dropout", grad_a.plan(h, x, seed, **shaped, **dropped), True

    if dtype is product:
        weight, bias = empty(width, width, dtype=dtype), empty(width, dtype=dtype)
        yield "fused_linear", "forward", fused_linear.plan(x, weight.t(), h, b, bias, **to), False
        yield "fused_linear", "backward", fused_linear.plan(x, weight, h, a, **to), False
        call = fused_linear.plan(x, weight, h, a, None, seed, **dropped)
        yield "fused_linear", "backward dropout", call, True

    rows, experts, width = 32768, 128, 2048  # 256 rows of an expert on average
    x, a = empty(rows, width, dtype=dtype), empty(experts, rank, width, dtype=a_dtype)
    b = empty(experts, width, rank, dtype=product).transpose(1, 2)
    h, bias = empty(rows, rank, dtype=product), empty(experts, width, dtype=dtype)
    ends, few = empty(experts, dtype=torch.int32), empty(8, dtype=torch.int64)
    yield "down of experts", "A", down_projection.plan(x, a, None, ends, **by, **to), False
    yield "down of experts", "B", down_projection.plan(x, b, None, ends, **by, **to), False
    yield "down of experts", "split", down_projection.plan(x[:16], a[:8], None, few, **by, **to), True
    yield "up of experts", "B", up_projection_.plan(x, h, b, None, None, bias, ends, **by, **to), False
    yield "up of experts", "A", up_projection_.plan(x, h, a, None, None, None, ends, **by, **to), False
    yield "grad_a of experts", "", grad_a.plan(h, x, None, ends, **shaped, **to), False


def _odd(target) -> Iterator[Case]:
    """Odd sizes and strides: it compiles and does not spill; its accesses are as narrow as they must be."""
    x, a, y, b = empty(333, 1001), empty(13, 1001, dtype=FP32), empty(333, 777), empty(777, 13).t()
    h, weight, ends = empty(333, 16), empty(777, 1001), empty(5, dtype=torch.int64)
    stacked_a, stacked_b = empty(5, 13, 1001, dtype=FP32), empty(5, 777, 13).transpose(1, 2)
    calls = {
        "down_projection": down_projection.plan(x, a, target=target),
        "up_projection": up_projection_.plan(y, h, b, target=target),
        "grad_a": grad_a.plan(h, x, rank=13, target=target),
        "fused_linear": fused_linear.plan(x, weight.t(), h, b, target=target),
        "down of experts": down_projection.plan(x, stacked_a, None, ends, target=target),
        "up of experts": up_projection_.plan(y, h, stacked_b, None, None, None, ends, target=target),
        "grad_a of experts": grad_a.plan(h, x, None, ends, rank=13, target=target),
    }
    for kernel, call in calls.items():
        yield Case(kernel, "odd", call.bind()[1], is_aligned=False)
    of_B = grad_a.plan(empty(333, 13), y, rank=13, out_dtype=BF16, target=target)
    yield Case("grad_a", "odd, of B", of_B.bind()[1], is_aligned=False)


def _sums(target) -> Iterator[Case]:
    """The kernel without products: what it writes once a tile are sums, one number a thread."""
    for name, tokens, width in (
        ("bf16", 8192, 4096),
        ("fp16", 8192, 4096),
        ("fp32", 8192, 4096),
        ("bf16", 333, 777),
    ):
        dtype = DTYPES[name][0]
        if target in AMD and dtype is FP32:
            continue
        dy = empty(tokens, width, dtype=dtype)
        call = grad_magnitude.plan(dy, dy, empty(width, dtype=FP32), dy)
        is_aligned = width % 16 == 0
        label = name if is_aligned else "odd"
        yield Case("grad_magnitude", label, call.bind()[1], is_aligned, has_products=False, few_stores=1)
