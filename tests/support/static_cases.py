"""Every kernel with every configuration of its table, as the launches that would be made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mica.kernels import configs
from mica.kernels.common import padded_rank
from mica.kernels.down_projection import plan_down_projection
from mica.kernels.embedding import plan_embedding, plan_grad_a_embedding
from mica.kernels.experts_down import plan_experts_down
from mica.kernels.experts_grad_a import plan_experts_grad_a
from mica.kernels.experts_up import plan_experts_up
from mica.kernels.fused_linear import plan_fused_linear
from mica.kernels.grad_a import plan_grad_a
from mica.kernels.launching import Launch
from mica.kernels.up_projection import plan_up_projection

TARGETS = tuple(configs.SHARED_MEMORY)
RANKS = (16, 64, 256)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# dtype of x, of lora_A, of the product
DTYPES = {
    "bf16": (BF16, FP32, BF16),
    "fp16": (FP16, FP32, FP16),
    "fp32": (FP32, FP32, FP32),
    "bf16 in fp32": (BF16, FP32, FP32),
}


@dataclass
class Case:
    kernel: str
    label: str
    launch: Launch
    is_aligned: bool = True
    has_product: bool = True
    load_bits: int = 128  # the narrowest load that a main loop may have
    few_loads: int = 4  # how many loads of any width a kernel without a main loop may have (seed, h)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases(target: str) -> list[Case]:
    """All of them for one target."""
    launches = [case for rank in RANKS for case in _cases_of_rank(target, rank)]
    for case in launches:
        # Copies to shared memory are as wide as its layout is contiguous, which the tensor cores choose: four
        # numbers where 16-bit ones become fp32, one where fp32 ones are transposed (g, the small operand).
        if "bf16 in fp32" in case.label:
            case.load_bits = 64
        if case.kernel in ("grad_a", "experts_grad_a") and "fp32" in case.label:
            case.load_bits = 32
        if case.kernel in ("grad_a", "experts_grad_a") and target == "gfx942" and " r=16 " in case.label:
            case.load_bits = min(case.load_bits, 64)  # a tile of g that small is 8 bytes a thread
        if case.kernel == "experts_up" and target == "gfx942" and case.label[2:].startswith("fp32 r=16 "):
            case.load_bits = 64  # and so is one of h
    return launches


def _cases_of_rank(target: str, rank: int) -> Iterator[Case]:
    for name, dtypes in DTYPES.items():
        if name == "fp16" and rank != 16:
            continue  # the same code as bf16 but for one conversion
        every = name == "bf16"  # the other dtypes with the default configuration only
        yield from _linear(target, rank, name, *dtypes, every)
        yield from _experts(target, rank, name, *dtypes, every)
        if name in ("bf16", "fp32"):
            yield from _fused(target, rank, name, *dtypes, every)
            yield from _embedding(target, rank, name, dtypes[-1])
    if rank == RANKS[0]:
        yield from _unaligned(target)


def _linear(target, rank, name, dtype, a_dtype, product, every) -> Iterator[Case]:
    tokens, width = 8192, 4096
    x, a = empty(tokens, width, dtype=dtype), empty(rank, width, dtype=a_dtype)
    b, h = empty(width, rank, dtype=product).t(), empty(tokens, rank, dtype=product)
    seed, options = empty(1, dtype=torch.int64), {"target": target, "compute_dtype": product}
    block_r, size = padded_rank(rank), product.itemsize
    dropped = {"dropout_p": 0.1, "seed": seed}

    table = configs.down_projection(target, tokens, block_r, size)
    for index, config in enumerate(table if every else table[:1]):
        label = f"{name} r={rank} {tuple(config)}"
        for side, factor in (("A", a), ("B", b)):
            launch = plan_down_projection(x, factor, config=config, **options).bound()[1]
            yield Case("down_projection", f"{side} {label}", launch)
        if index == 0:
            launch = plan_down_projection(x, a, config=config, **dropped, **options).bound()[1]
            yield Case("down_projection", f"A {label} dropout", launch)
    few = empty(16, width, dtype=dtype)
    launch = plan_down_projection(few, a, **options).bound()[1]
    yield Case("down_projection", f"split {name} r={rank}", launch)
    if launch.then is not None and rank == RANKS[0]:  # it does not depend on the rank
        yield Case("add_parts", name, launch.then, has_product=False, few_loads=0)

    table = configs.up_projection(target, tokens, block_r, size)
    for index, config in enumerate(table if every else table[:1]):
        label = f"{name} r={rank} {tuple(config)}"
        for side, factor in (("B", b), ("A", a)):
            launch = plan_up_projection(x, h, factor, config=config, **options).bound()[1]
            yield Case("up_projection", f"{side} {label}", launch)
        if index == 0:
            launch = plan_up_projection(x, h, a, config=config, **dropped, **options).bound()[1]
            yield Case("up_projection", f"A {label} dropout", launch)

    for index, config in enumerate(configs.grad_a(target, tokens, block_r, size)):
        label = f"{name} r={rank} {tuple(config)}"
        launch = plan_grad_a(h, x, rank, config=config, target=target).bound()[1]
        yield Case("grad_a", label, launch)
        if index == 0 and every:
            launch = plan_grad_a(h, x, rank, config=config, target=target, **dropped).bound()[1]
            yield Case("grad_a", f"{label} dropout", launch)


def _experts(target, rank, name, dtype, a_dtype, product, every) -> Iterator[Case]:
    """128 experts of 256 rows on average."""
    rows, experts, width = 32768, 128, 2048
    x, a = empty(rows, width, dtype=dtype), empty(experts, rank, width, dtype=a_dtype)
    b = empty(experts, width, rank, dtype=product).transpose(1, 2)
    h, bias = empty(rows, rank, dtype=product), empty(experts, width, dtype=dtype)
    offsets, options = empty(experts, dtype=torch.int32), {"target": target}
    block_r, size, each = padded_rank(rank), product.itemsize, rows // experts

    table = configs.experts_down(target, each, block_r, size)
    for config in table if every else table[:1]:
        label = f"{name} r={rank} {tuple(config)}"
        for side, factor in (("A", a), ("B", b)):
            made = {"config": config, "compute_dtype": product, **options}
            launch = plan_experts_down(x, offsets, factor, **made).bound()[1]
            yield Case("experts_down", f"{side} {label}", launch)
    few = empty(16, width, dtype=dtype), empty(8, dtype=torch.int64)
    launch = plan_experts_down(*few, a[:8], compute_dtype=product, **options).bound()[1]
    yield Case("experts_down", f"split {name} r={rank}", launch)

    table = configs.experts_up(target, each, block_r, size)
    for config in table if every else table[:1]:
        label = f"{name} r={rank} {tuple(config)}"
        for side, factor, own in (("B", b, bias), ("A", a, None)):
            made = {"config": config, "bias": own, "compute_dtype": product, **options}
            launch = plan_experts_up(x, h, offsets, factor, **made).bound()[1]
            yield Case("experts_up", f"{side} {label}", launch, few_loads=8)  # of the ends of rows, too

    for config in configs.experts_grad_a(target, experts * width, block_r, size):
        label = f"{name} r={rank} {tuple(config)}"
        launch = plan_experts_grad_a(h, x, offsets, rank, config=config, **options).bound()[1]
        yield Case("experts_grad_a", label, launch)


def _fused(target, rank, name, dtype, a_dtype, product, every) -> Iterator[Case]:
    tokens, width = 8192, 4096
    x, weight = empty(tokens, width, dtype=dtype), empty(width, width, dtype=dtype)
    a, b = empty(rank, width, dtype=a_dtype), empty(width, rank, dtype=product).t()
    h, bias = empty(tokens, rank, dtype=product), empty(width, dtype=dtype)
    dropped = {"dropout_p": 0.1, "seed": empty(1, dtype=torch.int64)}
    has_copy_engine = target.startswith("sm_") and int(target[3:]) >= 90
    for descriptor in (False, True) if has_copy_engine else (False,):
        kernel = "fused_descriptor" if descriptor else "fused_linear"
        options = {"target": target, "descriptor": descriptor}
        form = (padded_rank(rank), True, dtype.itemsize, descriptor)
        table = configs.fused_linear(target, tokens, width, *form, False)
        for config in table if every else table[:1]:
            label = f"{name} r={rank} {tuple(config)}"
            launch = plan_fused_linear(x, weight.t(), h, b, bias=bias, config=config, **options).bound()[1]
            yield Case(kernel, f"forward {label}", launch)
            launch = plan_fused_linear(x, weight, h, a, config=config, **options).bound()[1]
            yield Case(kernel, f"backward {label}", launch)
            if every and config == configs.fused_linear(target, tokens, width, *form, True)[0]:
                launch = plan_fused_linear(x, weight, h, a, config=config, **dropped, **options).bound()[1]
                yield Case(kernel, f"backward {label} dropout", launch)


def _embedding(target, rank, name, product) -> Iterator[Case]:
    tokens, width, size, label = 8192, 4096, 32000, f"{name} r={rank}"
    indices = empty(tokens, dtype=torch.int64)
    factor = empty(width, rank, dtype=product).t()
    launch = plan_embedding(indices, empty(rank, size, dtype=product), factor, target=target).bound()[1]
    yield Case("embedding", label, launch)
    launch = plan_grad_a_embedding(empty(tokens, rank, dtype=FP32), indices, rank, size).bound()[1]
    yield Case("scatter", label, launch, is_aligned=False, has_product=False)  # a gather of single numbers


def _unaligned(target) -> Iterator[Case]:
    """Odd sizes and strides: it compiles and does not spill; its accesses are as narrow as they must be."""
    x, a = empty(333, 1001, dtype=BF16), empty(13, 1001, dtype=FP32)
    y, b = empty(333, 777, dtype=BF16), empty(777, 13, dtype=BF16).t()
    h, weight = empty(333, 16, dtype=BF16), empty(777, 1001, dtype=BF16)
    offsets, stack = empty(5, dtype=torch.int64), empty(5, 777, 13, dtype=BF16).transpose(1, 2)
    choices = {
        "down_projection": plan_down_projection(x, a, target=target),
        "up_projection": plan_up_projection(y, h, b, target=target),
        "grad_a": plan_grad_a(h, x, 13, target=target),
        "fused_linear": plan_fused_linear(x, weight.t(), h, b, target=target),
        "experts_down": plan_experts_down(x, offsets, empty(5, 13, 1001, dtype=FP32), target=target),
        "experts_up": plan_experts_up(y, h, offsets, stack, target=target),
        "experts_grad_a": plan_experts_grad_a(h, x, offsets, 13, target=target),
    }
    for kernel, choice in choices.items():
        yield Case(kernel, "odd", choice.bound()[1], is_aligned=False)
