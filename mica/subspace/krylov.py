"""The smallest eigenpairs of a Gram matrix by block Krylov subspaces of its shifted inverse.

Subspace iteration on C⁻¹ is fast only if C's smallest eigenvalues are far below the others. Those of a
square weight are (they go down to zero as j²), those of a rectangular one are not: they stop at the edge of
the Marchenko-Pastur law, where neighbours differ by per cents. Two measures, together about ten
times as accurate per step as C⁻¹ without them (Gaussian 4096 × 11008, 16 vectors, blocks of 24):

- the shift: 40 steps of plain Lanczos show where the spectrum begins, and the operator is (C − σI)⁻¹ with σ
  just below. A Cholesky factor of C − σI proves that σ was not too high; if there is none, σ is lowered;
- Rayleigh-Ritz over all blocks so far (block Lanczos with full reorthogonalisation), never restarted.

``gram`` below is a ``HostGram`` or a ``BatchGram``; leading dimensions of every tensor are its batch's.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from mica.subspace.host import partial_eigenvectors

LANCZOS_STEPS = 40
NORM_STEPS = 12  # enough for ‖C‖ alone
FIRST_CHECK = 7
MOST_STEPS = 24


class Bounds(NamedTuple):
    """Of C's spectrum, each (batch): a lower estimate of ‖C‖, and what to shift by, first guess to last."""

    norm: torch.Tensor
    shifts: tuple[torch.Tensor, ...]


class Ritz(NamedTuple):
    """``vectors`` X (batch, n, rank) by ascending Ritz values of C; ``converged`` for all of the batch.

    ``small`` (batch, rank, rank), on the host, is Xᵀ C X.
    """

    vectors: torch.Tensor
    converged: bool
    small: torch.Tensor | None = None


def block_size(rank: int) -> int:
    return max(rank + 8, 16) if rank <= 32 else 6 * rank // 10 + 10


def fits(size: int, rank: int) -> bool:
    """Whether the subspaces stay well below half of the space, where LAPACK's solvers are the faster ones."""
    return 2 * block_size(rank) * (FIRST_CHECK + 3) <= size


def norm(gram, seed: int, steps: int = NORM_STEPS) -> torch.Tensor:
    """‖C‖, or up to a quarter less, (batch) on the host: plain Lanczos, without any reorthogonalisation.

    What rounding does to it brings copies of Ritz values that have converged, and none above the spectrum
    (Paige 1980). A step is a quarter of one of ``bounds``, which matters to small matrices: n = 192 takes
    0.5 ms in place of 2 to 3, of 9 for the whole solution, and n = 576 1.0 in place of 2.5, of 31.
    """
    (projected,) = _tridiagonal(gram, seed, {min(steps, gram.size)})
    return torch.linalg.eigvalsh(projected)[..., -1].clamp_min(0)


def _tridiagonal(gram, seed: int, counts: set[int]) -> Iterator[torch.Tensor]:
    """The projected matrix of plain Lanczos, (batch, steps, steps) on the host, after each count of steps."""
    vector = previous = random_block(gram, 1, seed)
    diagonal, below = [], []
    for step in range(max(counts)):
        following = gram.apply(vector)
        if below:
            following -= previous * below[-1]
        diagonal.append((vector * following).sum(-2, keepdim=True))
        following -= vector * diagonal[-1]
        below.append(torch.linalg.vector_norm(following, dim=-2, keepdim=True))
        # An exhausted space goes on with rounding noise, or, where there is none, with zero.
        previous, vector = vector, following / below[-1].clamp_min(torch.finfo(torch.float64).tiny)
        if step + 1 in counts:
            both = gram.read(*(torch.cat(values, -1).squeeze(-2) for values in (diagonal, below)))
            yield torch.diag_embed(both[0]) + torch.diag_embed(both[1][..., :-1], offset=-1)


def bounds(gram, seed: int, steps: int = LANCZOS_STEPS) -> Bounds:
    """‖C‖ and shifts just below the smallest eigenvalue, from two lengths of one Lanczos run."""
    steps = min(steps, gram.size)
    least = move = largest = None

    def look(_, projected: torch.Tensor) -> int:
        """The number of further steps, 0 to stop: at the last one, and where the spectrum begins at zero."""
        nonlocal least, move, largest
        taken = projected.shape[-1]
        values = torch.linalg.eigvalsh(projected)
        half = torch.linalg.eigvalsh(projected[..., : (taken + 1) // 2, : (taken + 1) // 2])
        least, largest = values[..., 0], values[..., -1].clamp_min(0)
        move = half[..., 0] - least
        # Ritz values come down to the edge as 1/steps²: a third of the last move is still to go.
        return 0 if (least - move / 3 < 0.25 * least).all() else steps - taken

    first = min(NORM_STEPS, steps)
    if gram.patience:  # without orthogonalisation: the edges are the same, and most of the launches are gone
        for projected in _tridiagonal(gram, seed, {first, steps}):
            if not look(None, projected):
                break
    else:
        block_lanczos(gram, gram.apply, random_block(gram, 1, seed), steps, first, look)
    floor = resolution(gram.size, largest)
    candidates = (least - 0.6 * move, least - 2 * move, torch.zeros_like(least))
    return Bounds(largest, tuple(torch.where(c > 16 * floor, c, -floor) for c in candidates))


def resolution(size: int, norm):
    """4 √n ε₆₄ ‖C‖: eigenvalues of the (n, n) Gram matrix C closer than this are one to fp64."""
    return 4 * math.sqrt(size) * torch.finfo(torch.float64).eps * norm


def smallest_eigenvectors(gram, rank: int, limits: Bounds, eps: float, seed: int) -> Ritz | None:
    """``rank`` eigenvectors of C to its smallest eigenvalues; None if C has no factor to work with.

    ``eps``: the unit round-off that the caller's result will have; vectors converge to what an SVD in
    that precision can tell of them (backward error eps ‖W‖), or to what fp64 resolves.
    """
    shift, definite = limits.shifts[0], gram.factor(limits.shifts[0])
    for lower in limits.shifts[1:]:
        if definite.all():
            break
        shift = torch.where(definite, shift, lower)
        definite = gram.factor(shift)
    if not definite.all():
        return None
    width = block_size(rank)
    most = max(1, min(MOST_STEPS, gram.size // width))
    first = min(FIRST_CHECK + gram.patience, most)
    history: list[float] = []
    ritz = None

    def judge(basis: torch.Tensor, projected: torch.Tensor) -> int:
        """Rayleigh-Ritz; the number of further steps that seem to be needed, 0 to stop."""
        nonlocal ritz
        coefficients = _largest_eigenvectors(*gram.read(projected), rank)
        vectors = gram.combine(basis, coefficients.to(gram.device, non_blocking=True))
        vectors, _, _ = gram.orthonormal(vectors)
        excess, small = relative_residual(gram, vectors, limits.norm, eps)
        ritz = Ritz(vectors, excess <= 1, small)
        stalled = bool(history) and excess > 0.5 * history[-1]
        history.append(excess)
        if ritz.converged or stalled:
            return 0
        # a step gains a factor of 8 on Gaussian spectra
        likely = math.ceil(math.log(excess, 8)) if math.isfinite(excess) else 1
        return gram.patience or max(1, min(4, likely))

    block_lanczos(gram, gram.solve, random_block(gram, width, seed), most, first, judge)
    return ritz


def residual_of(gram, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """‖C X − X H‖ (batch) and H = Xᵀ C X (batch, rank, rank) of orthonormal ``vectors`` X."""
    products = gram.apply(vectors)
    small = gram.inner(vectors, products)
    return torch.linalg.matrix_norm(products - gram.combine(vectors, small)), small


def relative_residual(
    gram, vectors: torch.Tensor, norm: torch.Tensor, eps: float
) -> tuple[float, torch.Tensor]:
    """The worst ``residual_of`` a batch over the one that is small enough; and H, on the host."""
    rank = vectors.shape[-1]
    residual, small = gram.read(*residual_of(gram, vectors))
    values = torch.linalg.eigvalsh(small).clamp_min(0)
    # The certificate allows 1e-5 Σθ for √r ‖R‖; an SVD's own error allows eps ‖W‖ σ_r.
    allowed = torch.minimum(1e-6 * values.sum(-1) / rank**0.5, 0.5 * eps * (norm * values[..., -1]).sqrt())
    allowed = torch.maximum(allowed, resolution(gram.size, norm))
    return torch.where(residual == 0, 0.0, residual / allowed).max().item(), small


def random_block(gram, count: int, seed: int) -> torch.Tensor:
    """Orthonormal (batch, n, count), the same for every matrix of a batch and on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(count, gram.size, dtype=torch.float64, generator=generator, device="cpu")
    block = gram.empty(count)
    block.copy_(start.to(gram.device, non_blocking=True).mT)
    return gram.orthonormal(block)[0]


def block_lanczos(
    gram,
    operation: Callable[[torch.Tensor], torch.Tensor],
    block: torch.Tensor,
    steps: int,
    first_check: int | None = None,
    judge: Callable[[torch.Tensor, torch.Tensor], int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block Lanczos: an orthonormal basis Q of span{S, F S, …, F^(steps−1) S}, and Qᵀ F Q.

    ``block`` is S, ``operation`` the symmetric F. Of Qᵀ F Q the lower triangle is filled in. From
    ``first_check`` steps on ``judge`` may end it early.
    """
    width = block.shape[-1]
    basis = gram.empty(width * steps)
    shape = (*gram.batch_shape, width * steps, width * steps)
    projected = torch.zeros(shape, dtype=torch.float64, device=gram.device)
    for step in range(steps):
        start, end = width * step, width * (step + 1)
        basis[..., start:end] = block
        block, coefficients = _orthogonalised(gram, operation(block), basis[..., :end])
        projected[..., start:end, :end] = coefficients.mT
        if judge is not None and step + 1 >= first_check:
            further = judge(basis[..., :end], projected[..., :end, :end])
            if not further:
                break
            first_check = min(step + 1 + further, steps)
    return basis, projected


def _orthogonalised(gram, block: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(new, coefficients) with block = basis @ coefficients + new @ a triangle, (basis, new) orthonormal.

    Twice is enough, unless the block was nearly dependent: then Householder fills it up with
    directions that have to be cleared of the basis once more. So has what was nothing but rounding noise,
    and lost most of its length the second time: a Gram with few nonzero columns is exhausted after as many
    steps, and ‖C‖ came out 180 times too large.
    """
    coefficients, triangle = 0, None
    for _ in range(4):
        part = gram.inner(basis, block)
        block = gram.subtract(block, basis, part)
        if gram.patience and triangle is None and basis.shape == block.shape:
            # Of a square weight the inverse of the least eigenvalue may dwarf all others, and the first block
            # is nearly dependent (by its law, of 4 % of Gaussian ones); later ones are not.
            block, factor, safe = *torch.linalg.qr(block), False
        else:
            block, factor, safe = gram.orthonormal(block)
        coefficients = part if triangle is None else coefficients + part @ triangle
        twice, triangle = triangle is not None, factor if triangle is None else factor @ triangle
        if twice and safe and gram.holds(_have_kept_length, factor.diagonal(dim1=-2, dim2=-1)):
            break
    return block, coefficients


def _have_kept_length(diagonal: torch.Tensor) -> torch.Tensor:
    return (diagonal.abs() > 0.5).all()


def _largest_eigenvectors(matrices: torch.Tensor, count: int) -> torch.Tensor:
    """(batch, m, count) of symmetric matrices by descending eigenvalue; the lower triangle is read."""
    size = matrices.shape[-1]
    each = [partial_eigenvectors(-matrix.numpy(), count) for matrix in matrices.reshape(-1, size, size)]
    vectors = torch.stack([torch.from_numpy(vectors) for vectors in each])
    return vectors.reshape(*matrices.shape[:-2], size, count)
