"""Each kernel's launch on this device, the call that makes it in the product, and its exact result.

Of each kernel there is what differs on a device: aligned operands in several tiles and split sums, odd sizes
with rows that lie apart, one token, and fp32. Any shape, layout and dtype is what `tests/kernels` is for.
"""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.machine import DEVICE
from bench.suites.harness import pick
from mica.kernels.common import target_of
from mica.kernels.down_projection import down_projection
from mica.kernels.fused_linear import fused_linear, why_not_descriptor
from mica.kernels.grad_a import grad_a
from mica.kernels.launching import Launcher, PlannedCall
from mica.kernels.limits import padded_columns
from mica.kernels.prepared_b import prepare
from mica.kernels.up_projection import up_projection_
from mica.paths import torch_path
from tests.support.guarding import guarded
from tests.support.oracle import Problem, problem

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# tokens, in_features, out_features, rank, dtype of x and W; A and B are fp32
TINY = {
    "aligned": (40, 1024, 128, 16, BF16),
    "odd": (33, 41, 37, 8, FP16),
    "one token": (1, 64, 48, 64, BF16),
    "fp32": (32, 64, 48, 16, FP32),
}
REAL = {
    "aligned": (2048, 4096, 4096, 16, BF16),
    "odd": (333, 1001, 777, 8, FP16),
    "one token": (1, 4096, 4096, 64, BF16),
    "fp32": (512, 1024, 1024, 16, FP32),
}
SHAPES = pick(quick=TINY, default=TINY, cuda=REAL)


@functools.cache
def operands(shape: str) -> Problem:
    """On the device, each between guard bands; rows lie apart where the sizes are odd."""
    tokens, inner, out, rank, dtype = SHAPES[shape]
    torch.manual_seed(0)
    p = problem((tokens,), inner, out, rank, dtype, FP32)
    for field in fields(p):
        value = getattr(p, field.name)
        if isinstance(value, Tensor):
            setattr(p, field.name, guarded(value if shape == "odd" else packed(value), DEVICE))
    return p


def packed(tensor: Tensor) -> Tensor:
    """Contiguous, with the strides of its shape: ``contiguous()`` leaves that of a single row as it is."""
    return tensor.clone(memory_format=torch.contiguous_format)


class Case(NamedTuple):
    """A kernel's launch, the call that makes it in the product, and what its result must be, in fp64."""

    planned: PlannedCall
    call: Callable[[], Tensor]
    expected: Tensor
    dtype: torch.dtype  # whose tolerance holds


def case(kernel: Launcher, *tensors, expected: Tensor, dtype: torch.dtype, **numbers) -> Case:
    planned = kernel.plan(*tensors, **numbers)
    return Case(planned, functools.partial(kernel, *tensors, **numbers), expected, dtype)


def low_rank(product: Tensor) -> Tensor:
    """h or g as the kernels hand it on: columns of 0 up to a multiple of 16."""
    return F.pad(product, (0, padded_columns(product.shape[1]) - product.shape[1]))


def down(p: Problem, by: str) -> Case:
    dtype, scaled = p.x.dtype, {"scale": p.scaling, "compute_dtype": p.x.dtype}
    if by == "A":
        x, factor = p.x, p.lora_A
        h = torch_path.down_projection(x.double(), factor.double(), p.scaling, FP64)
    else:
        x, factor = p.grad_output, prepare(p.lora_B, dtype)
        h = torch_path.grad_h(x.double(), p.lora_B.double(), p.scaling, FP64)
    return case(down_projection, x, factor, expected=low_rank(h), dtype=dtype, **scaled)


def up(p: Problem, by: str) -> Case:
    """In place, so every call gets a copy of its own."""
    dtype, rank = p.x.dtype, p.lora_A.shape[0]
    if by == "B":
        base, h, factor = p.grad_output, h_of(p), prepare(p.lora_B, dtype)
    else:
        base, h, factor = p.x, g_of(p), p.lora_A
    exact = torch_path.up_projection(base.double(), h[:, :rank].double(), factor[:rank].double().t())

    def call() -> Tensor:
        return up_projection_(base.clone(), h, factor)

    return Case(up_projection_.plan(base, h, factor), call, exact, dtype)


def h_of(p: Problem) -> Tensor:
    return low_rank(torch_path.down_projection(p.x, p.lora_A, p.scaling, p.x.dtype))


def g_of(p: Problem) -> Tensor:
    return low_rank(torch_path.grad_h(p.grad_output, p.lora_B, p.scaling, p.x.dtype))


def gradient_of_a(p: Problem) -> Case:
    """Products of 16-bit factors are exact in fp32, so fp32's tolerance holds."""
    g, rank = g_of(p), p.lora_A.shape[0]
    exact = torch_path.grad_a(g[:, :rank].double(), p.x.double())
    return case(grad_a, g, p.x, rank=rank, expected=exact, dtype=FP32)


def fused(p: Problem, side: str, descriptor: bool) -> Case:
    dtype, rank = p.x.dtype, p.lora_A.shape[0]
    if side == "forward":
        tensors, bias = (p.x, p.weight.t(), h_of(p), prepare(p.lora_B, dtype)), p.bias
        y = F.linear(p.x.double(), p.weight.double(), bias.double())
        exact = torch_path.up_projection(y, tensors[2][:, :rank].double(), p.lora_B.double())
    else:
        tensors, bias = (p.grad_output, p.weight, g_of(p), p.lora_A), None
        exact = torch_path.grad_x(
            *(t.double() for t in tensors[:2]), tensors[2][:, :rank].double(), p.lora_A.double()
        )
    reason = why_not_descriptor(*tensors[:2], target_of(p.x.device)) if descriptor else None
    if reason:
        pytest.skip(reason)
    return case(fused_linear, *tensors, bias, expected=exact, dtype=dtype, descriptor=descriptor)


KERNELS = {  # name -> (case, shapes): a variant to compile each, as few as there must be
    "down-A": (functools.partial(down, by="A"), ("aligned", "odd", "one token", "fp32")),
    "down-B": (functools.partial(down, by="B"), ("aligned",)),
    "up-B": (functools.partial(up, by="B"), ("aligned", "odd", "one token", "fp32")),
    "up-A": (functools.partial(up, by="A"), ("aligned",)),
    "grad_a": (gradient_of_a, ("aligned", "odd", "fp32")),
    "fused-forward": (functools.partial(fused, side="forward", descriptor=False), ("aligned", "odd")),
    "fused-backward": (functools.partial(fused, side="backward", descriptor=False), ("aligned",)),
    "descriptor-forward": (functools.partial(fused, side="forward", descriptor=True), ("aligned",)),
    "descriptor-backward": (functools.partial(fused, side="backward", descriptor=True), ("aligned",)),
}
