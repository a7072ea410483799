"""Calls of the skinny kernels with operands as the product passes them, and their exact results."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mica.kernels.down_projection import down_projection
from mica.kernels.grad_a import grad_a
from mica.kernels.launching import Launcher, PlannedCall
from mica.kernels.limits import padded_columns
from mica.kernels.up_projection import up_projection_
from mica.paths import reference_path


class Work(NamedTuple):
    """What is launched, ``kernel(*operands, **numbers)``, and what its result must be, in fp64."""

    kernel: Launcher
    operands: tuple[Tensor, ...]
    numbers: dict
    expected: Tensor

    def plan(self, **options) -> PlannedCall:
        return self.kernel.plan(*self.operands, **self.numbers, **options)


def down(x: Tensor, factor: Tensor) -> Work:
    """With columns of 0 up to a multiple of 16, as the kernel hands it on."""
    h = reference_path.down_projection(x.double(), factor.double(), 1.0, torch.float64)
    padded = F.pad(h, (0, padded_columns(h.shape[1]) - h.shape[1]))
    return Work(down_projection, (x, factor), {"compute_dtype": x.dtype}, padded)


def up(base: Tensor, h: Tensor, factor: Tensor, rank: int) -> Work:
    y = reference_path.up_projection(base.double(), h[:, :rank].double(), factor[:rank].t().double())
    return Work(up_projection_, (base, h, factor), {}, y)


def gradient_of_a(g: Tensor, x: Tensor, rank: int) -> Work:
    return Work(grad_a, (g, x), {"rank": rank}, reference_path.grad_a(g[:, :rank].double(), x.double()))
