"""Gram matrices of a batch on an accelerator: few, large matrix products instead of many small kernels.

Thin triangular solves are bound by latency there, so each factor is inverted once and applied by products.
CholeskyQR replaces Householder's QR, and problems of a few hundred numbers are solved on the host. So that
the host need not wait for the answer to every check, a check that nearly always passes is assumed to have
passed until the next numbers are read. The same code runs on the CPU, where it is tested.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mica.subspace import lapack
from mica.subspace.gram import image, row_blocks, transposed_image
from mica.subspace.host import SAFE_PIVOTS

# CUDA compute capabilities with fp64 at half the rate of fp32, or better. All others have 1/32 or 1/64 of it.
_STRONG_FP64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}

# Short side / long side up to which fp32 products, summed in fp64, are tried on devices with weak fp64.
MIXED_UP_TO = 0.5

# Entries up to this size have squares whose sums are finite in fp32. If small ones underflow, ``error`` shows
# it.
_LARGEST_MIXED = 2.0**50

_ERROR_VECTORS = 8
_ERROR_POWER = 6

# How often a solution by the fp32 factor is corrected, each time by one product with C.
_CORRECTIONS = 1

# PyTorch's precision settings as (backend, operation), each after those that it inherits from. All ways to
# set a precision, `torch.set_float32_matmul_precision` too, write these, and products (from PyTorch 2.9 on)
# read nothing else.
_SETTINGS = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul"))
_REDUCED = ("tf32", "bf16")

# The public properties do not reach all of them: that of `torch.backends.mkldnn` sets another one. Without
# these functions products may be reduced, which the measured error of a Gram then shows.
_get_precision = getattr(torch._C, "_get_fp32_precision_getter", lambda *setting: "none")
_set_precision = getattr(torch._C, "_set_fp32_precision_setter", None)
_precision_lock = threading.Lock()


def has_weak_fp64(device: torch.device) -> bool:
    """Whether fp64 arithmetic runs at a small fraction of fp32's rate."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) not in _STRONG_FP64


def may_be_mixed(matrices: torch.Tensor) -> bool:
    """Whether fp32 products are worth a try for ``matrices`` (batch, out, in)."""
    short, long = sorted(matrices.shape[-2:])
    if short > MIXED_UP_TO * long or not has_weak_fp64(matrices.device):
        return False
    return torch.stack(torch.aminmax(matrices)).abs().max().item() <= _LARGEST_MIXED


class DoubtfulError(ArithmeticError):
    """Vectors that were assumed to be independent are not."""


class BatchGram:
    """C = tallᵀ tall of every matrix in ``tall`` (batch, long, n): (batch, n, n) fp64 on its device.

    With ``mixed`` the products of each block of rows are in fp32, and only their sum is in fp64; ``error``
    (batch), on the host, then bounds ‖C − tallᵀ tall‖₂ with a probability of 1 − 1e-8. The factor is in fp32
    too, and ``solve`` corrects its solutions in fp64. ``exceeds`` always works in fp64.

    With ``careful`` the factor is in fp64, and ``presume`` and ``orthonormal`` wait for their answer.
    Otherwise they assume yes, and ``read`` raises DoubtfulError where that was wrong.

    The methods are those of ``HostGram``, which describes them; vectors are (batch, n, count) fp64.
    """

    on_accelerator = True
    steps_per_wait = 4

    def __init__(self, tall: torch.Tensor, mixed: bool = False, careful: bool = False):
        self.size = tall.shape[-1]
        self.batch_shape = tall.shape[:-2]
        self.device = tall.device
        self.careful = careful
        self._mixed = mixed
        self._inverse: torch.Tensor | None = None
        self._doubts: list[tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = []
        if mixed:
            self._gram = _gram(tall, torch.float32)
            self.error = error_bound(tall, self._gram)
        else:
            self._gram = _gram(tall, torch.float64)
            self.error = torch.zeros(self.batch_shape, dtype=torch.float64, device="cpu")

    def empty(self, count: int) -> torch.Tensor:
        shape = (*self.batch_shape, self.size, count)
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def read(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        doubts = self._doubts
        self._doubts = []
        doubted = [operand for _, operands in doubts for operand in operands]
        copies = iter(_copy_to_host(*tensors, *doubted))
        result = [next(copies) for _ in tensors]
        for condition, operands in doubts:
            if not condition(*(next(copies) for _ in operands)):
                raise DoubtfulError
        return result

    def presume(self, condition: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> bool:
        if self.careful:
            return bool(condition(*self.read(*tensors)))
        self._doubts.append((condition, tensors))
        return True

    def apply(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self._gram, vectors)

    def factor(self, shift: torch.Tensor) -> torch.Tensor:
        self._inverse = None
        self._shift = to_device(shift, self.device)[:, None, None]
        shifted = self._gram.clone()
        diagonal = shifted.diagonal(dim1=-2, dim2=-1).sub_(self._shift.squeeze(-1))
        if self._mixed and not self.careful:  # in fp32, whose range is smaller than that of C
            self._scale = diagonal.amax(-1)[:, None, None]
            shifted = (shifted / self._scale).float()
        with full_fp32():
            triangle, info = torch.linalg.cholesky_ex(shifted)
            definite = self.read(info.double())[0] == 0
            if definite.all():
                inverse = torch.zeros_like(shifted).mT  # column-major: solved in place
                del shifted, diagonal
                inverse.diagonal(dim1=-2, dim2=-1).fill_(1)
                self._inverse = torch.linalg.solve_triangular(triangle, inverse, upper=False, out=inverse)
        return definite

    def solve(self, vectors: torch.Tensor) -> torch.Tensor:
        if self._inverse.dtype == torch.float64:
            return torch.bmm(self._inverse.mT, torch.bmm(self._inverse, vectors))
        solution = self._solve_roughly(vectors)
        for _ in range(_CORRECTIONS):
            shifted = torch.addcmul(vectors, self._shift, solution)
            solution += self._solve_roughly(torch.baddbmm(shifted, self._gram, solution, alpha=-1))
        return solution

    def _solve_roughly(self, vectors: torch.Tensor) -> torch.Tensor:
        with full_fp32():
            solution = torch.bmm(self._inverse.mT, torch.bmm(self._inverse, vectors.float()))
        return solution / self._scale

    def exceeds(self, vectors: torch.Tensor, weight: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        self._inverse = None
        weighted = vectors * to_device(weight, self.device)[:, None, None]
        shifted = torch.baddbmm(self._gram, weighted, vectors.mT)
        shifted.diagonal(dim1=-2, dim2=-1).sub_(to_device(bound, self.device).unsqueeze(-1))
        return self.read(torch.linalg.cholesky_ex(shifted).info.double())[0] == 0

    def smallest(self, count: int) -> tuple[torch.Tensor, ...]:
        found = [
            map(torch.from_numpy, lapack.smallest_eigenpairs(matrix.T, count))
            for matrix in self._gram.cpu().numpy()
        ]
        values, vectors, norm = map(torch.stack, zip(*found, strict=True))
        return values, to_device(vectors, self.device), norm

    def eigenvalues(self) -> torch.Tensor:
        return torch.linalg.eigvalsh(self._gram)

    def inner(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.bmm(left.mT, right)

    def combine(self, vectors: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        return torch.bmm(vectors, coefficients)

    def subtract(
        self, target: torch.Tensor, vectors: torch.Tensor, coefficients: torch.Tensor
    ) -> torch.Tensor:
        return torch.baddbmm(target, vectors, coefficients, alpha=-1)

    def orthonormal(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        triangle, info = torch.linalg.cholesky_ex(torch.bmm(vectors.mT, vectors))
        if self.presume(_are_safe, info.double(), triangle.diagonal(dim1=-2, dim2=-1)):
            identity = torch.eye(vectors.shape[-1], dtype=torch.float64, device=self.device)
            inverse = torch.linalg.solve_triangular(triangle, identity, upper=False)
            return torch.bmm(vectors, inverse.mT), triangle.mT, True
        return *torch.linalg.qr(vectors), False

    def svd(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The reduced SVD, by CholeskyQR2 or Householder's QR, and an SVD of (count, count) on the host."""
        try:
            unit, first, _ = self.orthonormal(vectors)
            unit, second, _ = self.orthonormal(unit)
            small = torch.linalg.svd(*self.read(torch.bmm(second, first)))
        except DoubtfulError:
            unit, triangle = torch.linalg.qr(vectors)
            small = torch.linalg.svd(*self.read(triangle))
        left, values, right = (to_device(part, self.device) for part in small)
        return torch.bmm(unit, left), values, right


def _copy_to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one dtype on the host, by one copy."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the host to ``device``, without waiting for the device's queue."""
    return numbers.to(device, non_blocking=True)


def _are_safe(info: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    return ((info == 0) & (pivots.amin(-1) > SAFE_PIVOTS * pivots.amax(-1))).all()


def _gram(tall: torch.Tensor, product_dtype: torch.dtype) -> torch.Tensor:
    """tallᵀ tall in fp64, with the products of one block of rows in ``product_dtype``.

    Only the block lower triangle is computed, in panels of a quarter of the columns: 5/8 of the work.
    """
    size = tall.shape[-1]
    panel = max(128, math.ceil(size / 4))
    total = torch.zeros(*tall.shape[:-2], size, size, dtype=torch.float64, device=tall.device)
    for _, block in row_blocks(tall, product_dtype):
        for start in range(0, size, panel):
            columns = slice(start, start + panel)
            target = total[..., start:, columns]
            if product_dtype == torch.float64:
                target.baddbmm_(block[..., start:].mT, block[..., columns])
            else:
                with full_fp32():  # TF32 would lose 1e-3: no proof would hold, and all be done again in fp64
                    product = block[..., start:].mT @ block[..., columns]
                target += product
    for start in range(panel, size, panel):
        columns = slice(start - panel, start)
        total[..., columns, start:] = total[..., start:, columns].mT
    return total


@contextmanager
def full_fp32() -> Iterator[None]:
    """A context in which fp32 products use all bits of fp32; afterwards every setting is what it was.

    The settings are the whole process's, so only one thread at a time is inside. A setting that is not set
    reads as the one it inherits from: those come first, and whatever still reads as reduced was set itself.
    """
    with _precision_lock:
        changed = []
        try:
            for setting in _SETTINGS:
                before = _get_precision(*setting)
                if before in _REDUCED:
                    _set_precision(*setting, "ieee")
                    changed.append((setting, before))
            yield
        finally:
            for setting, before in changed:
                _set_precision(*setting, before)


def error_bound(tall: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """A bound on ‖E‖₂ for E = tallᵀ tall − gram, (batch) fp64 on the host, from products with random vectors.

    ‖M‖ ≤ 10 √(2/π) maxᵢ ‖M ωᵢ‖ for k Gaussian ωᵢ, except with probability 10^−k (Halko, Martinsson, Tropp
    2011, lemma 4.1), here for M = E⁶, whose root shrinks the overestimate to a factor of about 2.5.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (gram.shape[-1], _ERROR_VECTORS)
    vectors = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
    vectors = to_device(vectors, gram.device).expand(*gram.shape[:-2], *shape)
    log_norm = 0
    for _ in range(_ERROR_POWER):
        vectors = transposed_image(tall, image(tall, vectors)) - gram @ vectors
        largest = vectors.norm(dim=-2).amax(-1)
        log_norm = log_norm + largest.log()
        vectors = vectors / largest.clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
    log_factor = math.log(10 * math.sqrt(2 / math.pi))
    return ((log_norm.cpu() + log_factor) / _ERROR_POWER).exp()
