"""Each kernel with operands as the product passes them, and its exact result.

`KERNELS` has what differs on a device: aligned operands in several tiles and split sums, odd sizes with rows
that lie apart, one token, and fp32. Any shape, layout and dtype is what `tests/kernels` is for.
"""

import functools
from dataclasses import fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.machine import DEVICE
from bench.suites.harness import pick
from mica.kernels.down_projection import down_projection
from mica.kernels.fused_linear import fused_linear
from mica.kernels.grad_a import grad_a
from mica.kernels.launching import Launcher, PlannedCall
from mica.kernels.limits import padded_columns
from mica.kernels.prepared_b import prepare
from mica.kernels.up_projection import up_projection_
from mica.paths import reference_path
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
SHAPES = pick(default=TINY, cuda=REAL)


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


class Work(NamedTuple):
    """What is launched, ``kernel(*operands, **numbers)``, and what its result must be, in fp64."""

    kernel: Launcher
    operands: tuple[Tensor, ...]
    numbers: dict
    expected: Tensor
    dtype: torch.dtype  # whose tolerance holds

    def plan(self, **options) -> PlannedCall:
        return self.kernel.plan(*self.operands, **self.numbers, **options)

    def call(self) -> Tensor:
        """One that updates its first operand gets a copy of it."""
        first, *others = self.operands
        first = first.clone() if self.kernel is up_projection_ else first
        return self.kernel(first, *others, **self.numbers)


def low_rank(product: Tensor) -> Tensor:
    """h or g as the kernels hand it on: columns of 0 up to a multiple of 16."""
    return F.pad(product, (0, padded_columns(product.shape[1]) - product.shape[1]))


def down(x: Tensor, factor: Tensor, scale: float = 1.0, exact: Tensor | None = None) -> Work:
    """``exact``: the factor before it was prepared."""
    exact = factor if exact is None else exact
    h = reference_path.down_projection(x.double(), exact.double(), scale, FP64)
    numbers = {"scale": scale, "compute_dtype": x.dtype}
    return Work(down_projection, (x, factor), numbers, low_rank(h), x.dtype)


def up(base: Tensor, h: Tensor, factor: Tensor, rank: int, exact: Tensor | None = None) -> Work:
    exact = factor[:rank].t() if exact is None else exact
    y = reference_path.up_projection(base.double(), h[:, :rank].double(), exact.double())
    return Work(up_projection_, (base, h, factor), {}, y, base.dtype)


def gradient_of_a(g: Tensor, x: Tensor, rank: int) -> Work:
    """Products of 16-bit factors are exact in fp32, so fp32's tolerance holds."""
    exact = reference_path.grad_a(g[:, :rank].double(), x.double())
    return Work(grad_a, (g, x), {"rank": rank}, exact, FP32)


def h_of(p: Problem) -> Tensor:
    return low_rank(reference_path.down_projection(p.x, p.lora_A, p.scaling, p.x.dtype))


def g_of(p: Problem) -> Tensor:
    return low_rank(reference_path.grad_h(p.grad_output, p.lora_B, p.scaling, p.x.dtype))


def fused(p: Problem, side: str) -> Work:
    dtype, rank = p.x.dtype, p.lora_A.shape[0]
    if side == "forward":
        tensors, bias = (p.x, p.weight.t(), h_of(p), prepare(p.lora_B, dtype)), p.bias
        y = F.linear(p.x.double(), p.weight.double(), bias.double())
        exact = reference_path.up_projection(y, tensors[2][:, :rank].double(), p.lora_B.double())
    else:
        tensors, bias = (p.grad_output, p.weight, g_of(p), p.lora_A), None
        exact = reference_path.grad_x(
            *(t.double() for t in tensors[:2]), tensors[2][:, :rank].double(), p.lora_A.double()
        )
    return Work(fused_linear, (*tensors, bias), {}, exact, dtype)


def prepared(p: Problem) -> Tensor:
    return prepare(p.lora_B, p.x.dtype)


ALL = ("aligned", "odd", "one token", "fp32")
KERNELS = {  # name -> (work, shapes): a variant to compile each, as few as there must be
    "down-A": (lambda p: down(p.x, p.lora_A, p.scaling), ALL),
    "down-B": (lambda p: down(p.grad_output, prepared(p), p.scaling, p.lora_B.t()), ALL[:1]),
    "up-B": (lambda p: up(p.grad_output, h_of(p), prepared(p), len(p.lora_A), p.lora_B), ALL),
    "up-A": (lambda p: up(p.x, g_of(p), p.lora_A, len(p.lora_A)), ALL[:1]),
    "grad_a": (lambda p: gradient_of_a(g_of(p), p.x, len(p.lora_A)), ("aligned", "odd", "fp32")),
    "fused-forward": (functools.partial(fused, side="forward"), ALL[:2]),
    "fused-backward": (functools.partial(fused, side="backward"), ALL[:1]),
}
