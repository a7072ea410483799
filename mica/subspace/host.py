"""One Gram matrix on the CPU, its products and its factors, by SciPy's BLAS and LAPACK (``lapack``).

PyTorch has no symmetric rank-k update, no symmetric product and no factorisation in place. SciPy has all
three, and they take most of the time here: with n = 4096, fp64 and 2 threads, the Gram of 4096 rows takes
0.71 instead of 1.0 s and Cholesky 0.27 instead of 0.41 s, and all of it fits n² numbers instead of 3 n².

Call everything here within ``threads.one_pool``.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mica.subspace import lapack
from mica.subspace.gram import row_blocks

# Side of the square blocks in which a triangle is mirrored. n = 1024 takes 1.9 ms, and 3.5 in blocks of 256.
_MIRROR_BLOCK = 64

# The largest array that glibc's malloc looks at when it decides what to keep, in bytes.
_LARGEST_SEEN = 2**25

# CholeskyQR squares the condition number: below this ratio of pivots its result is not trusted.
SAFE_PIVOTS = 1e-6


class HostGram:
    """C = tallᵀ tall of one weight, (n, n) fp64; see ``BatchGram`` for the same on a device.

    One column-major buffer holds C below the diagonal, and above it the Cholesky factor of C − shift·I (or of
    the certificate's matrix). Both diagonals are kept apart, and ``_show`` puts in place the one that the
    next call needs. Vectors are (n, count) fp64, column-major.
    """

    def __init__(self, tall: Tensor):
        self.size = tall.shape[1]
        self.batch_shape = torch.Size()
        self.device = tall.device
        _raise_what_malloc_keeps(self.size)
        buffer = np.zeros((self.size, self.size), order="F")
        for _, block in row_blocks(tall):
            # a block is row-major as a rule, and its transpose column-major
            if block.stride(0) == 1:
                lapack.syrk(block.numpy(), transposed=True, lower=True, into=buffer)
            else:
                lapack.syrk(block.contiguous().numpy().T, lower=True, into=buffer)
        self._buffer = buffer
        self._diagonal = buffer.diagonal().copy()
        self._factor_diagonal = np.full(self.size, np.nan)

    def empty(self, count: int) -> Tensor:
        return torch.empty(count, self.size, dtype=torch.float64, device="cpu").T

    def read(self, *tensors: Tensor) -> Sequence[Tensor]:
        """fp64 tensors, on the host."""
        return tensors

    def apply(self, vectors: Tensor) -> Tensor:
        """C @ vectors."""
        self._show(self._diagonal)
        return torch.from_numpy(lapack.symm(self._buffer, vectors.numpy()))

    def factor(self, shift: Tensor) -> Tensor:
        """Factorise C − shift·I; returns whether it is positive definite, as a tensor () on the host."""
        self._mirror(shift.item())
        return torch.tensor(self._factorise(), device="cpu")

    def solve(self, vectors: Tensor) -> Tensor:
        """(C − shift·I)⁻¹ @ vectors, by the last ``factor``."""
        self._show(self._factor_diagonal)
        solution = vectors.numpy().copy(order="F")
        lapack.trsm(self._buffer, solution, transposed=True)
        return torch.from_numpy(lapack.trsm(self._buffer, solution))

    def exceeds(self, vectors: Tensor, weight: Tensor, bound: Tensor) -> Tensor:
        """Whether C + weight·vectors vectorsᵀ − bound·I is positive definite; overwrites the factor."""
        self._mirror(bound.item())
        lapack.syrk(vectors.numpy(), alpha=weight.item(), into=self._buffer)
        return torch.tensor(self._factorise(), device="cpu")

    def smallest(self, count: int) -> tuple[Tensor, ...]:
        """C's smallest eigenvalues (count), ascending, their vectors (n, count), and ‖C‖.

        On the host, but for the vectors.
        """
        self._show(self._diagonal)
        return tuple(map(torch.from_numpy, lapack.smallest_eigenpairs(self._buffer, count)))

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """leftᵀ @ right."""
        return torch.from_numpy(lapack.gemm(left.numpy(), right.numpy(), transposed=True))

    def combine(self, vectors: Tensor, coefficients: Tensor) -> Tensor:
        """vectors @ coefficients."""
        return torch.from_numpy(lapack.gemm(vectors.numpy(), coefficients.numpy()))

    def orthonormal(self, vectors: Tensor) -> tuple[Tensor, Tensor, bool]:
        """QR of ``vectors``: an orthonormal basis, the triangle, and whether Cholesky was safe for it.

        Where it was not, the decomposition is Householder's.
        """
        host = vectors.numpy()
        triangle = lapack.syrk(host, transposed=True)
        if lapack.potrf(triangle):
            pivots = triangle.diagonal()
            if pivots.min() > SAFE_PIVOTS * pivots.max():
                unit = lapack.trsm(triangle, host.copy(order="F"), on_the_right=True)
                return torch.from_numpy(unit), torch.from_numpy(triangle), True

        unit, upper = torch.linalg.qr(vectors)
        return unit.T.contiguous().T, upper, False

    def svd(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reduced SVD of ``vectors`` (long, count), for any ``long``."""
        return torch.linalg.svd(vectors, full_matrices=False)

    def subtract(self, target: Tensor, vectors: Tensor, coefficients: Tensor) -> Tensor:
        """target − vectors @ coefficients, in the memory of ``target``."""
        lapack.gemm(vectors.numpy(), coefficients.numpy(), alpha=-1.0, into=target.numpy())
        return target

    def _mirror(self, shift: float) -> None:
        """Write C − shift·I on and above the diagonal, from C below it."""
        buffer = self._buffer
        size = self.size
        for start in range(0, size, _MIRROR_BLOCK):
            rows = slice(start, start + _MIRROR_BLOCK)
            block = np.tril(buffer[rows, rows], -1)
            buffer[rows, rows] = block + block.T
            for column in range(start + _MIRROR_BLOCK, size, _MIRROR_BLOCK):
                columns = slice(column, column + _MIRROR_BLOCK)
                buffer[rows, columns] = buffer[columns, rows].T
        self._show(self._diagonal - shift)

    def _factorise(self) -> bool:
        """Replace the upper triangle by its Cholesky factor; returns whether there is one."""
        definite = lapack.potrf(self._buffer)
        self._factor_diagonal = self._buffer.diagonal().copy()
        return definite

    def _show(self, diagonal: np.ndarray) -> None:
        """Put a diagonal in place: C's own, or the factor's."""
        np.fill_diagonal(self._buffer, diagonal)


def _raise_what_malloc_keeps(size: int) -> None:
    """Make glibc keep the memory of a solution for the next one, by freeing two (n, n) matrices, untouched.

    It gives freed memory back to the system beyond twice the largest array that was freed so far. Without
    this, solutions of a square weight, whose arrays are all of one size, begin with new pages each time (576
    x 576: 1,900 page faults, 7 of 24 ms).
    """
    if 16 * size * size < _LARGEST_SEEN:
        np.empty((2, size, size))
