"""Gram matrices of a batch on an accelerator: few, large matrix products instead of many small kernels.

Thin triangular solves are bound by latency there, so each factor is inverted once and applied by products.
CholeskyQR replaces Householder's QR, and problems of a few hundred numbers are solved on the host. The same
code runs on the CPU, where it is tested.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mica.subspace import lapack
from mica.subspace.gram import row_blocks
from mica.subspace.host import SAFE_PIVOTS


class BatchGram:
    """C = tallᵀ tall of every matrix in ``tall`` (batch, long, n): (batch, n, n) fp64 on its device.

    The methods are those of ``HostGram``, which describes them; vectors are (batch, n, count) fp64.
    """

    def __init__(self, tall: Tensor):
        self.size = tall.shape[-1]
        self.batch_shape = tall.shape[:-2]
        self.device = tall.device
        self._gram = _gram(tall)
        self._inverse = None

    def empty(self, count: int) -> Tensor:
        shape = (*self.batch_shape, self.size, count)
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def read(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on the host, by one copy."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def apply(self, vectors: Tensor) -> Tensor:
        return torch.bmm(self._gram, vectors)

    def factor(self, shift: Tensor) -> Tensor:
        self._inverse = None
        shifted = self._gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).sub_(shift.to(self.device).unsqueeze(-1))
        triangle, info = torch.linalg.cholesky_ex(shifted)
        definite = info.cpu() == 0
        if definite.all():
            inverse = torch.zeros_like(shifted).mT  # column-major: solved in place
            del shifted
            inverse.diagonal(dim1=-2, dim2=-1).fill_(1)
            self._inverse = torch.linalg.solve_triangular(triangle, inverse, upper=False, out=inverse)
        return definite

    def solve(self, vectors: Tensor) -> Tensor:
        return torch.bmm(self._inverse.mT, torch.bmm(self._inverse, vectors))

    def exceeds(self, vectors: Tensor, weight: Tensor, bound: Tensor) -> Tensor:
        self._inverse = None
        weighted = vectors * weight.to(self.device)[:, None, None]
        shifted = torch.baddbmm(self._gram, weighted, vectors.mT)
        shifted.diagonal(dim1=-2, dim2=-1).sub_(bound.to(self.device).unsqueeze(-1))
        return torch.linalg.cholesky_ex(shifted).info.cpu() == 0

    def smallest(self, count: int) -> tuple[Tensor, ...]:
        found = [
            map(torch.from_numpy, lapack.smallest_eigenpairs(matrix.T, count))
            for matrix in self._gram.cpu().numpy()
        ]
        values, vectors, norm = map(torch.stack, zip(*found, strict=True))
        return values, vectors.to(self.device), norm

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.mT, right)

    def combine(self, vectors: Tensor, coefficients: Tensor) -> Tensor:
        return torch.bmm(vectors, coefficients)

    def subtract(self, target: Tensor, vectors: Tensor, coefficients: Tensor) -> Tensor:
        return torch.baddbmm(target, vectors, coefficients, alpha=-1)

    def orthonormal(self, vectors: Tensor) -> tuple[Tensor, Tensor, bool]:
        triangle, info = torch.linalg.cholesky_ex(torch.bmm(vectors.mT, vectors))
        pivots, failed = self.read(triangle.diagonal(dim1=-2, dim2=-1), info.double())
        if not failed.any() and (pivots.amin(-1) > SAFE_PIVOTS * pivots.amax(-1)).all():
            identity = torch.eye(vectors.shape[-1], dtype=torch.float64, device=self.device)
            inverse = torch.linalg.solve_triangular(triangle, identity, upper=False)
            return torch.bmm(vectors, inverse.mT), triangle.mT, True
        return *torch.linalg.qr(vectors), False

    def svd(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reduced SVD, by Householder's QR and an SVD of (count, count) on the host."""
        unit, triangle = torch.linalg.qr(vectors)
        left, values, right = (part.to(self.device) for part in torch.linalg.svd(triangle.cpu()))
        return torch.bmm(unit, left), values, right


def _gram(tall: Tensor) -> Tensor:
    """tallᵀ tall in fp64.

    Only the block lower triangle is computed, in panels of a quarter of the columns: 5/8 of the work.
    """
    size = tall.shape[-1]
    panel = max(128, math.ceil(size / 4))
    total = torch.zeros(*tall.shape[:-2], size, size, dtype=torch.float64, device=tall.device)
    for _, block in row_blocks(tall):
        for start in range(0, size, panel):
            columns = slice(start, start + panel)
            total[..., start:, columns].baddbmm_(block[..., start:].mT, block[..., columns])
    for start in range(panel, size, panel):
        columns = slice(start - panel, start)
        total[..., columns, start:] = total[..., start:, columns].mT
    return total
