"""One Gram matrix on an accelerator: few, large matrix products instead of many small kernels.

Thin triangular solves are bound by latency there, so each factor is inverted once and applied by products.
CholeskyQR replaces Householder's QR, and problems of a few hundred numbers are solved on the host. The same
code runs on the CPU, where it is tested. Layers are solved one after the other: one large matrix fills a
device, and all small ones of a model take seconds.
"""

from __future__ import annotations

import math

import torch

from mica.subspace import krylov, lapack
from mica.subspace.candidate import Problem, judge
from mica.subspace.gram import row_blocks
from mica.subspace.host import SAFE_PIVOTS
from mica.subspace.methods import BY
from mica.subspace.result import MinorSubspace

# Devices whose weights the host solves: MPS has no fp64.
ON_HOST = ("cpu", "mps")


def is_on_host(device: torch.device) -> bool:
    """Whether weights on this device are solved on the CPU."""
    return device.type in ON_HOST


class DeviceGram:
    """C = tallᵀ tall of one weight, (n, n) fp64 on its device.

    The methods are those of ``HostGram``, which describes them; vectors are (n, count) fp64.
    """

    def __init__(self, tall: torch.Tensor):
        self.size = tall.shape[1]
        self.device = tall.device
        self._gram = _gram(tall)
        self._inverse: torch.Tensor | None = None

    def empty(self, count: int) -> torch.Tensor:
        return torch.empty(self.size, count, dtype=torch.float64, device=self.device)

    def read(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The tensors on the host, by one copy."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def apply(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._gram @ vectors

    def factor(self, shift: torch.Tensor) -> bool:
        self._inverse = None
        shifted = self._gram.clone()
        shifted.diagonal().sub_(shift)
        triangle, info = torch.linalg.cholesky_ex(shifted)
        if info.item():
            return False
        inverse = torch.zeros_like(shifted).mT  # column-major: solved in place
        del shifted
        inverse.diagonal().fill_(1)
        self._inverse = torch.linalg.solve_triangular(triangle, inverse, upper=False, out=inverse)
        return True

    def solve(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._inverse.mT @ (self._inverse @ vectors)

    def exceeds(self, vectors: torch.Tensor, weight: torch.Tensor, bound: torch.Tensor) -> bool:
        self._inverse = None
        shifted = torch.addmm(self._gram, vectors * weight, vectors.mT)
        shifted.diagonal().sub_(bound)
        return not torch.linalg.cholesky_ex(shifted).info.item()

    def smallest(self, count: int) -> tuple[torch.Tensor, ...]:
        symmetric = self._gram.cpu().numpy().T
        values, vectors, norm = map(torch.from_numpy, lapack.smallest_eigenpairs(symmetric, count))
        return values, vectors.to(self.device), norm

    def eigenvalues(self) -> torch.Tensor:
        return torch.linalg.eigvalsh(self._gram)

    def inner(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left.mT @ right

    def combine(self, vectors: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        return vectors @ coefficients

    def subtract(
        self, target: torch.Tensor, vectors: torch.Tensor, coefficients: torch.Tensor
    ) -> torch.Tensor:
        return torch.addmm(target, vectors, coefficients, alpha=-1)

    def orthonormal(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        triangle, info = torch.linalg.cholesky_ex(vectors.mT @ vectors)
        pivots, failed = self.read(triangle.diagonal(), info.double())
        if not failed and pivots.min() > SAFE_PIVOTS * pivots.max():
            identity = torch.eye(vectors.shape[1], dtype=torch.float64, device=self.device)
            inverse = torch.linalg.solve_triangular(triangle, identity, upper=False)
            return vectors @ inverse.mT, triangle.mT, True
        return *torch.linalg.qr(vectors), False

    def svd(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The reduced SVD, by Householder's QR and an SVD of (count, count) on the host."""
        unit, triangle = torch.linalg.qr(vectors)
        left, values, right = (part.to(self.device) for part in torch.linalg.svd(triangle.cpu()))
        return unit @ left, values, right


def _gram(tall: torch.Tensor) -> torch.Tensor:
    """tallᵀ tall in fp64.

    Only the block lower triangle is computed, in panels of a quarter of the columns: 5/8 of the work.
    """
    size = tall.shape[1]
    panel = max(128, math.ceil(size / 4))
    total = torch.zeros(size, size, dtype=torch.float64, device=tall.device)
    for _, block in row_blocks(tall):
        for start in range(0, size, panel):
            columns = slice(start, start + panel)
            total[start:, columns].addmm_(block[:, start:].mT, block[:, columns])
    for start in range(panel, size, panel):
        columns = slice(start - panel, start)
        total[columns, start:] = total[start:, columns].mT
    return total


def solve_on_device(weight: torch.Tensor, rank: int, method: str) -> MinorSubspace | None:
    """Solve one matrix on its device; None where that is left to the host.

    Left are what is not certified, and tall weights that are numerically null.

    Args:
        weight: The matrix, (out_features, in_features), finite, on an accelerator.
        rank, method: As ``minor_subspace`` takes them.
    """
    name = _device_method(min(weight.shape), rank, method)
    if name is None:
        return None
    problem = Problem(weight, DeviceGram, rank)
    triplets = BY[name](problem)
    if triplets is None:
        return None
    result = judge(problem, triplets, name)
    return result if result.certified else None


def _device_method(size: int, rank: int, method: str) -> str | None:
    """How a problem with a Gram matrix (size, size) is solved; None: not here."""
    if method == "svd" or 4 * rank > 3 * size:
        return None
    if method == "gram":
        return "gram"
    if krylov.fits(size, rank):
        return "krylov"
    if method == "auto":
        return "gram"
    return None
