"""The smallest eigenpairs of a Gram matrix by block Krylov subspaces of its shifted inverse.

Subspace iteration on C⁻¹ is fast only if C's smallest eigenvalues are far below the others. Those of a
square weight are (they go down to zero as j²), those of a rectangular one are not: they stop at the edge of
the Marchenko-Pastur law, where neighbours differ by per cents. Two measures together make a step about ten
times as accurate as C⁻¹ alone does (Gaussian 4096 × 11008, 16 vectors, blocks of 24):

- a shift: 40 steps of plain Lanczos show where the spectrum begins, and the operator is (C − σI)⁻¹ with σ
  just below. A Cholesky factor of C − σI proves that σ was not too high; if there is none, σ is lowered;
- Rayleigh-Ritz over all blocks so far (block Lanczos with full reorthogonalisation), never restarted.

``gram`` is a ``HostGram`` or a ``BatchGram``, whose batch gives the leading dimensions of every tensor.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mica.subspace import lapack

LANCZOS_STEPS = 40
NORM_STEPS = 12  # enough for ‖C‖ alone, see `bounds`
FIRST_CHECK = 7
MOST_STEPS = 24
SEED = 0  # of the random vectors from which subspaces are built


class Bounds(NamedTuple):
    """What is known of the spectrum of a Gram matrix C.

    Attributes:
        norm: A lower estimate of ‖C‖, (batch).
        shifts: Shifts to try one after the other, from the best guess to one that is sure, each (batch).
    """

    norm: Tensor
    shifts: tuple[Tensor, ...]


def block_size(rank: int) -> int:
    """The width of the blocks for ``rank`` eigenvectors."""
    if rank <= 32:
        return max(rank + 8, 16)
    return 6 * rank // 10 + 10


def fits(size: int, rank: int) -> bool:
    """Whether the subspaces stay well below half of the space. Beyond, LAPACK's solvers are faster."""
    return 2 * block_size(rank) * (FIRST_CHECK + 3) <= size


def _tridiagonal(gram, counts: set[int]) -> Iterator[Tensor]:
    """The projected matrix of plain Lanczos, (batch, steps, steps) on the host, after each count of steps."""
    vector = previous = random_block(gram, 1)
    diagonal = []
    below = []
    for step in range(max(counts)):
        following = gram.apply(vector)
        if below:
            following -= previous * below[-1]
        diagonal.append((vector * following).sum(-2, keepdim=True))
        following -= vector * diagonal[-1]
        below.append(torch.linalg.vector_norm(following, dim=-2, keepdim=True))
        previous = vector
        # An exhausted space goes on with rounding noise, or, where there is none, with zero.
        vector = following / below[-1].clamp_min(torch.finfo(torch.float64).tiny)
        if step + 1 in counts:
            alpha, beta = gram.read(torch.cat(diagonal, -1).squeeze(-2), torch.cat(below, -1).squeeze(-2))
            yield torch.diag_embed(alpha) + torch.diag_embed(beta[..., :-1], offset=-1)


def bounds(gram) -> Bounds:
    """‖C‖ and shifts just below the smallest eigenvalue, from two lengths of one Lanczos run.

    It is plain Lanczos, without any reorthogonalisation. Rounding makes copies of Ritz values that have
    converged, but none above the spectrum (Paige 1980). ‖C‖ is up to a quarter too small. The start is
    random, so some miss by more. With one eigenvalue above a dense rest, the worst spectrum tried, it is 1 in
    2000 of them for n from 64 to 1000. With half as many steps as ``NORM_STEPS`` 2 to 8 in 100 miss, and some
    find half of ‖C‖.

    Args:
        gram: The Gram matrix C, a ``HostGram`` or a ``BatchGram``.
    """
    for projected in _tridiagonal(gram, {min(NORM_STEPS, gram.size), min(LANCZOS_STEPS, gram.size)}):
        values = torch.linalg.eigvalsh(projected)
        least = values[..., 0]
        largest = values[..., -1].clamp_min(0)
        middle = (projected.shape[-1] + 1) // 2
        earlier = torch.linalg.eigvalsh(projected[..., :middle, :middle])
        move = earlier[..., 0] - least
        # Ritz values come down to the edge as 1/steps²: a third of the last move is still to go. No further
        # steps where the spectrum begins at zero.
        if (least - move / 3 < 0.25 * least).all():
            break

    floor = resolution(gram.size, largest)
    candidates = (least - 0.6 * move, least - 2 * move, torch.zeros_like(least))
    shifts = [torch.where(shift > 16 * floor, shift, -floor) for shift in candidates]
    return Bounds(largest, tuple(shifts))


def resolution(size: int, norm):
    """4 √n ε₆₄ ‖C‖: fp64 cannot tell eigenvalues of the (n, n) Gram matrix C apart that are closer than this.

    ``norm`` is ‖C‖, a number or a tensor, as is the result.
    """
    return 4 * math.sqrt(size) * torch.finfo(torch.float64).eps * norm


def smallest_eigenpairs(gram, rank: int, limits: Bounds, eps: float) -> tuple[Tensor, Tensor] | None:
    """The smallest eigenvalues of C and their vectors, or None if there is no convergence.

    Args:
        gram: The Gram matrix C, a ``HostGram`` or a ``BatchGram``; its factor is overwritten.
        rank: The number of eigenvalues.
        limits: What `bounds` has found of C.
        eps: The unit round-off of the caller's result. Vectors converge to what an SVD in that precision can
            tell of them (backward error eps ‖W‖), or to what fp64 resolves.

    Returns:
        The values (batch, rank), ascending, on the host; and the vectors (batch, n, rank), orthonormal.
    """
    if not _factorise(gram, limits.shifts):
        return None

    width = block_size(rank)
    most = max(1, min(MOST_STEPS, gram.size // width))
    first = min(FIRST_CHECK, most)
    history = []
    pairs = None

    def judge(basis: Tensor, projected: Tensor) -> int:
        """Rayleigh-Ritz; the number of further steps that seem to be needed, 0 to stop."""
        nonlocal pairs
        coefficients = _largest_eigenvectors(*gram.read(projected), rank)
        vectors = gram.combine(basis, coefficients.to(gram.device))
        vectors, _, _ = gram.orthonormal(vectors)
        excess, values, rotation = relative_residual(gram, vectors, limits.norm, eps)
        if excess <= 1:
            pairs = values, gram.combine(vectors, rotation.to(gram.device))
            return 0
        stalled = bool(history) and excess > 0.5 * history[-1]
        history.append(excess)
        if stalled:
            return 0
        if not math.isfinite(excess):
            return 1
        likely = math.ceil(math.log(excess, 8))  # a step gains a factor of 8 on Gaussian spectra
        return max(1, min(4, likely))

    block_lanczos(gram, random_block(gram, width), most, first, judge)
    return pairs


def _factorise(gram, shifts: tuple[Tensor, ...]) -> bool:
    """Factorise C minus the first of the shifts, for each matrix, that leaves it positive definite.

    Returns False if none does.
    """
    shift = shifts[0]
    definite = gram.factor(shift)
    for lower in shifts[1:]:
        if definite.all():
            break
        shift = torch.where(definite, shift, lower)
        definite = gram.factor(shift)
    return bool(definite.all())


def residual_of(gram, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """‖C X − X H‖ (batch) and H = Xᵀ C X (batch, rank, rank) of orthonormal ``vectors`` X."""
    products = gram.apply(vectors)
    small = gram.inner(vectors, products)
    return torch.linalg.matrix_norm(products - gram.combine(vectors, small)), small


def relative_residual(gram, vectors: Tensor, norm: Tensor, eps: float) -> tuple[float, Tensor, Tensor]:
    """The largest ratio in the batch of ``residual_of`` to what is small enough; and H's eigenpairs.

    All on the host.
    """
    rank = vectors.shape[-1]
    residual, small = gram.read(*residual_of(gram, vectors))
    values, rotation = torch.linalg.eigh((small + small.mT) / 2)
    energies = values.clamp_min(0)
    largest = energies[..., -1]
    # The certificate allows 1e-5 Σθ for √r ‖R‖; an SVD's own error allows eps ‖W‖ σ_r.
    allowed = torch.minimum(1e-6 * energies.sum(-1) / rank**0.5, 0.5 * eps * (norm * largest).sqrt())
    allowed = torch.maximum(allowed, resolution(gram.size, norm))
    return torch.where(residual == 0, 0.0, residual / allowed).max().item(), values, rotation


def random_block(gram, count: int) -> Tensor:
    """Random orthonormal vectors (batch, n, count), the same for every matrix of a batch and every device."""
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    start = torch.randn(count, gram.size, dtype=torch.float64, generator=generator, device="cpu")
    block = gram.empty(count)
    block.copy_(start.mT)
    return gram.orthonormal(block)[0]


def block_lanczos(
    gram,
    block: Tensor,
    steps: int,
    first_check: int,
    judge: Callable[[Tensor, Tensor], int],
) -> None:
    """Block Lanczos: an orthonormal basis Q of span{S, F S, …, F^(steps−1) S}, and Qᵀ F Q, for ``judge``.

    ``block`` is S, F what ``gram.solve`` applies. Only the lower triangle of Qᵀ F Q is filled in. From
    ``first_check`` steps on, ``judge`` gets both, as far as they are, and returns after how many further
    steps it wants to see them again, 0 to end the iteration.
    """
    width = block.shape[-1]
    basis = gram.empty(width * steps)
    shape = (*gram.batch_shape, width * steps, width * steps)
    projected = torch.zeros(shape, dtype=torch.float64, device=gram.device)
    for step in range(steps):
        start = width * step
        end = start + width
        basis[..., start:end] = block
        block, coefficients = _orthogonalise(gram, gram.solve(block), basis[..., :end])
        projected[..., start:end, :end] = coefficients.mT
        if step + 1 >= first_check:
            further = judge(basis[..., :end], projected[..., :end, :end])
            if not further:
                break
            first_check = min(step + 1 + further, steps)


def _orthogonalise(gram, block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(new, coefficients) with block = basis @ coefficients + new @ a triangle, (basis, new) orthonormal.

    Orthogonalising twice is enough, unless the block was nearly dependent: then Householder fills it up with
    directions that have to be cleared of the basis once more. The same holds for a block of nothing but
    rounding noise, which loses most of its length the second time: a Gram with few nonzero columns is
    exhausted after as many steps, and without a third time ‖C‖ came out 180 times too large.
    """
    coefficients = triangle = None
    for _ in range(4):
        part = gram.inner(basis, block)
        block = gram.subtract(block, basis, part)
        block, factor, safe = gram.orthonormal(block)
        if triangle is None:
            coefficients = part
            triangle = factor
            continue
        coefficients = coefficients + part @ triangle
        triangle = factor @ triangle
        has_kept_length = (factor.diagonal(dim1=-2, dim2=-1).abs() > 0.5).all()
        if safe and has_kept_length:
            break
    return block, coefficients


def _largest_eigenvectors(matrices: Tensor, count: int) -> Tensor:
    """Eigenvectors (batch, m, count) of symmetric matrices, by descending eigenvalue.

    Only the lower triangle is read.
    """
    size = matrices.shape[-1]
    found = []
    for matrix in matrices.reshape(-1, size, size):
        _, vectors, _ = lapack.smallest_eigenpairs(-matrix.numpy(), count)
        found.append(torch.from_numpy(vectors))
    return torch.stack(found).reshape(*matrices.shape[:-2], size, count)
