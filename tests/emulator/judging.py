"""Operands of a kernel's case, and how near its result must be to the one in fp64."""

from __future__ import annotations

import torch

from tests.emulator.driver import settings
from tests.support import expert_cases
from tests.support.kernel_cases import operand

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDOFF = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}
SMALLEST = {F32: 1e-38, BF16: 1e-38, F16: 2.0**-25}
LAYOUTS = ("contiguous", "odd", "wide", "shifted", "columns")
settings.orders = ("forward", "random", "interleaved")


class WrongError(Exception):
    """A result that is not what it should be."""


def matrix(rows, columns, dtype, layout="contiguous", scale=1.0):
    """A random one.

    layout: "contiguous"; "columns", the transpose of one; "odd", rows apart by an odd number and the first
    one not aligned; "wide", rows apart and aligned; "shifted", contiguous, its address not aligned.
    """
    if layout in ("contiguous", "columns"):
        return operand(rows, columns, dtype, layout, scale)
    if layout == "odd":
        return operand(rows, columns, dtype, "rows", scale)
    stride, offset = (columns, 1) if layout == "shifted" else ((columns + 31) // 16 * 16, 0)
    buffer = torch.full((offset + rows * stride,), float("nan"), dtype=dtype)
    view = buffer.as_strided((rows, columns), (stride, 1), offset)
    return view.copy_((torch.randn(rows, columns) * scale).to(dtype))


def stack(experts, rows, columns, dtype, layout="contiguous", scale=1.0):
    """The same of one for each expert; "columns": as PEFT stores B."""
    if layout == "shifted":
        return matrix(experts * rows, columns, dtype, layout, scale).view(experts, rows, columns)
    kind = {"odd": "gaps", "columns": "peft"}.get(layout, "contiguous")
    return expert_cases.stack(experts, rows, columns, dtype, kind, scale)


def in_all_orders(call, restore=None):
    """call(), with its CTAs in some orders: the same bits each time.

    The first call plans and launches through Triton's front end, later ones launch by the kept plan.
    """
    results = []
    for seed, order in enumerate(settings.orders):
        settings.order, settings.seed = order, seed
        if restore is not None:
            restore()
        results.append(call().clone())
    bits = [r.view(torch.int16 if r.element_size() == 2 else torch.int32) for r in results]
    if not all(torch.equal(bits[0], other) for other in bits[1:]):
        raise WrongError("the result depends on the order of the CTAs")
    return results[0]


def judged(actual, exact, magnitude, dtype, products=None) -> float:
    """The largest error in units of the bound, about as tight as one rounding and sums in fp32 allow.

    ``magnitude``: the sum of the terms' sizes. ``products``: dtype of the operands of the tensor cores.

    Raises:
        WrongError: it is larger than 1, or a number is not finite.
    """
    if actual.shape != exact.shape or not torch.isfinite(actual).all():
        raise WrongError("not finite, or of another shape")
    sums = 2.0**-19 if products is F32 else 2.0**-20
    bound = 1.02 * ROUNDOFF[dtype] * exact.abs() + sums * magnitude + SMALLEST[dtype]
    error = ((actual.double() - exact).abs() / bound).max().item() if actual.numel() else 0.0
    if error > 1:
        raise WrongError(f"error {error:.3g} times the bound")
    return error
