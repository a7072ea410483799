"""Matrices (M×N) of 16 bits whose columns are scaled or summed by rows (N) of 32 bits: DoRA's formulas.

They are computed by parts. On a CPU PyTorch widens whole operands of a mixed operation: of 1024 x 1536 at
once that takes ten times as long as of parts that fit into a cache. Elsewhere it widens those of a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Numbers of a matrix that are widened at a time: on a CPU, and elsewhere, where they take 64 MB
_CACHED, _WIDENED = 2**17, 2**24


def multiply_add(z: Tensor, factor: Tensor, addend: Tensor | None, out: Tensor) -> Tensor:
    """factor⊙z + addend, rounded once, into ``out``, which may be z or the addend.

    Args:
        z: (M×N).
        factor: (N).
        addend: (M×N) or (N); None for none.
        out: (M×N).
    """
    if addend is None:
        for part, to in _parts(z, out):
            torch.mul(part, factor, out=to)
        return out
    for part, more, to in _parts(z, addend.expand_as(z), out):
        torch.addcmul(more, part, factor, out=to)
    return out


def scaled(matrix: Tensor, factor: Tensor) -> Tensor:
    """factor⊙matrix, (M×N) and contiguous, in the dtype of the matrix."""
    out = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    return multiply_add(matrix, factor, None, out)


def sums_of_products(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ left⊙right over the rows (N), in ``dtype``, of two matrices (M×N)."""
    total = torch.zeros(left.shape[1], dtype=dtype, device=left.device)
    for part, wide in _parts(left, right):
        total = total + (wide.to(dtype) * part).sum(0)
    return total


def grad_magnitude(grad_output: Tensor, z: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """dz = factor⊙dy (M×N), and Σ dy⊙z over the tokens (N), in the dtype of the factor.

    Args:
        grad_output: dy, (M×N).
        z: (M×N).
        factor: (N), in fp32 at least.
    """
    return scaled(grad_output, factor), sums_of_products(grad_output, z, factor.dtype)


def _parts(*matrices: Tensor) -> Iterator[Sequence[Tensor]]:
    """The same rows of each matrix."""
    rows, columns = matrices[0].shape
    numbers = _CACHED if matrices[0].is_cpu else _WIDENED
    step = max(1, numbers // max(1, columns))
    if rows <= step:
        return iter([matrices])
    return zip(*[matrix.split(step) for matrix in matrices], strict=True)
