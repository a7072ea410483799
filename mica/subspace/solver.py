"""``minor_subspace``: the left singular vectors of a weight that have the smallest singular values."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mica.subspace.certificate import certify, resolution_floor, spectral_norm
from mica.subspace.eigen import smallest_eigenpairs
from mica.subspace.gram import gram, image, transposed_image

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A result is certified when its proven energy excess is at most this share of the wanted energy, plus
# one resolution floor for each vector.
CERTIFIED_EXCESS = 1e-5

# A Ritz value below this many floors is rounding noise: the Gram does not show its singular vector.
NULL_FLOORS = 16

# Entries up to 2^200 leave room in fp64 for their fourth powers, summed; fp32 ends at 2^128 and 2^-149.
LARGEST_EXPONENT = 200


@dataclass(frozen=True, eq=False)
class MinorSubspace:
    """The minor singular subspace of a weight (out_features, in_features).

    basis: (out_features, rank), orthonormal columns, singular values descending, the entry of largest
        magnitude in each column positive; fp64 for an fp64 weight, else fp32; on the weight's device.
    singular_values: (rank,), descending, those of the columns of ``basis``; dtype and device as basis.
    method: what produced the result after fall-backs, "gram" or "svd".
    certified: proven, up to fp64 rounding, that the energy ‖weightᵀ basis‖² of the basis as returned
        exceeds the smallest possible one, Σσ², by at most 1e-5 Σσ² + rank · floor, where
        floor = 4 √min(out_features, in_features) · ε₆₄ · ‖weight‖² is what fp64 resolves.
    energy_excess: the proven upper bound on (‖weightᵀ basis‖² − Σσ²) / max(Σσ², rank · floor).
    """

    basis: torch.Tensor
    singular_values: torch.Tensor
    method: str
    certified: bool
    energy_excess: float


class _Problem(NamedTuple):
    """One weight as its tall (long, short) view, with the fp64 Gram of its short side and its norm."""

    tall: torch.Tensor
    gram: torch.Tensor
    norm: float
    rank: int
    basis_is_long: bool  # out_features > in_features: the wanted vectors live on the long side

    @property
    def floor(self) -> float:
        return resolution_floor(self.tall.shape[1], self.norm)


class _Solution(NamedTuple):
    """fp64: wanted vectors, the same triplets' vectors (short, rank) on the short side, singular values."""

    basis: torch.Tensor
    short_vectors: torch.Tensor
    singular_values: torch.Tensor
    method: str
    null_count: int  # wanted vectors that the weight does not determine


@torch.no_grad()
def minor_subspace(weight: torch.Tensor, rank: int, *, method: str = "auto") -> MinorSubspace:
    """The ``rank`` left singular vectors of ``weight`` with the smallest singular values (arXiv 2604.01694).

    The definition is ``torch.linalg.svd(weight, full_matrices=False).U[:, -rank:]``, here in fp64
    arithmetic and, by default, from a partial eigenproblem in place of the whole SVD. For an embedding
    pass ``weight.T``.

    Args:
        weight: (out_features, in_features), fp64, fp32, bf16 or fp16, any strides; it is not modified.
        rank: between 1 and min(out_features, in_features).
        method: "gram" (partial eigenproblem of the fp64 Gram matrix; falls back to "svd" where a wanted
            singular value of a tall weight is numerically null or the certificate fails), "svd" (whole
            fp64 SVD) or "auto" (the faster of the two).

    Raises:
        TypeError: weight is not a tensor, or not of one of the four dtypes.
        ValueError: weight is not 2-D, is empty, on the meta device or not finite; rank is out of range;
            method is unknown.

    Warns:
        UserWarning: singular values of a tall weight among the wanted ones are zero; their vectors are an
            orthonormal completion, which the weight does not determine.
    """
    _check_weight(weight)
    _check_rank(weight, rank)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, but got {method!r}.")
    matrix, scale = _prepared(weight.detach())
    problem = _problem(matrix, rank)
    solution = METHODS[method](problem)
    result = _result(problem, solution, weight, scale)
    if solution.method != "svd" and not result.certified:
        solution = _solve_svd(problem)
        result = _result(problem, solution, weight, scale)
    if solution.null_count:
        warnings.warn(
            f"{solution.null_count} of the {rank} smallest singular values of a weight of shape "
            f"{tuple(weight.shape)} are numerically null; their left singular vectors are an arbitrary "
            "orthonormal completion.",
            UserWarning,
            stacklevel=3,  # past the frame that the no_grad decorator adds
        )
    return result


def _check_weight(weight: torch.Tensor) -> None:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a torch.Tensor, but got {type(weight).__name__}.")
    if weight.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"weight must be of dtype float64, float32, bfloat16 or float16, but got {weight.dtype}."
        )
    if weight.ndim != 2:
        raise ValueError(
            f"weight must be 2-D (out_features, in_features), but got shape {tuple(weight.shape)}."
        )
    if weight.device.type == "meta":
        raise ValueError("weight must hold data, but got a tensor on the meta device; load the weight first.")
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, but got shape {tuple(weight.shape)}.")


def _check_rank(weight: torch.Tensor, rank: int) -> None:
    limit = min(weight.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= limit:
        raise ValueError(
            f"rank must be between 1 and min(out_features, in_features) = {limit} for a weight of shape "
            f"{tuple(weight.shape)}, but got {rank!r}."
        )


def _prepared(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The weight times a power of two that keeps squares of squares within fp64, and that power of two.

    It is 1, and nothing is copied, for every weight of a 16- or 32-bit dtype.
    """
    # Of a transposed view aminmax is slow: 100 against 2 ms for 576 x 49152. NaN propagates through it.
    extremes = torch.stack(torch.aminmax(weight if weight.is_contiguous() else weight.T)).double()
    if not torch.isfinite(extremes).all():
        count = weight.numel() - int(torch.isfinite(weight).sum())
        raise ValueError(
            f"weight must be finite, but got {count} NaN or infinite of {weight.numel()} entries."
        )
    if weight.device.type == "mps":  # has no fp64
        weight = weight.cpu()
    exponent = math.frexp(extremes.abs().max().item())[1]
    if abs(exponent) <= LARGEST_EXPONENT:
        return weight, 1.0
    scale = 2.0 ** max(-1000, min(1000, -exponent))
    return weight * scale, scale


def _problem(matrix: torch.Tensor, rank: int) -> _Problem:
    basis_is_long = matrix.shape[0] > matrix.shape[1]
    tall = matrix if basis_is_long else matrix.T
    short_gram = gram(tall)
    return _Problem(tall, short_gram, spectral_norm(short_gram), rank, basis_is_long)


def _solve_gram(problem: _Problem) -> _Solution:
    """Eigenvectors of the Gram, then the singular value decomposition of the weight on their span.

    With A the tall view and X the r eigenvectors, A X = P S Qᵀ: the columns of X Q and of P are the
    singular vectors of A on the short and on the long side. P is orthonormal however ill-conditioned
    A X is, and S keeps the digits that the square roots of the Gram's eigenvalues have lost.
    """
    eigenvalues, vectors = smallest_eigenpairs(problem.gram, problem.rank)
    if problem.basis_is_long and eigenvalues[0].item() <= NULL_FLOORS * problem.floor:
        return _solve_svd(problem)
    long_vectors, singular_values, rotation = torch.linalg.svd(
        image(problem.tall, vectors), full_matrices=False
    )
    short_vectors = vectors @ rotation.T
    basis = long_vectors if problem.basis_is_long else short_vectors
    return _Solution(basis, short_vectors, singular_values, "gram", 0)


def _solve_svd(problem: _Problem) -> _Solution:
    """Whole fp64 SVD, of the tall view: for a wide weight 1.9 to 2.9 times as fast as of the weight itself.

    Where singular values are zero, LAPACK's long vectors are an orthonormal completion.
    """
    tall, rank = problem.tall, problem.rank
    long_vectors, singular_values, short_vectors = torch.linalg.svd(tall.double(), full_matrices=False)
    null = singular_values <= tall.shape[0] * torch.finfo(torch.float64).eps * singular_values[0]
    short_vectors = short_vectors[-rank:].T
    return _Solution(
        basis=long_vectors[:, -rank:] if problem.basis_is_long else short_vectors,
        short_vectors=short_vectors,
        singular_values=singular_values[-rank:],
        method="svd",
        null_count=int(null[-rank:].sum()) if problem.basis_is_long else 0,
    )


def _solve_auto(problem: _Problem) -> _Solution:
    # Almost all vectors wanted: the Gram's way ends in an SVD as large as the weight's own. 576 x 576,
    # 288 / 576 vectors: 65 / 124 against 84 ms.
    if 4 * problem.rank > 3 * problem.tall.shape[1]:
        return _solve_svd(problem)
    return _solve_gram(problem)


METHODS: dict[str, Callable[[_Problem], _Solution]] = {
    "auto": _solve_auto,
    "gram": _solve_gram,
    "svd": _solve_svd,
}


def _result(problem: _Problem, solution: _Solution, weight: torch.Tensor, scale: float) -> MinorSubspace:
    """Cast, fix the signs, and judge the basis as it is returned, rounding to fp32 included."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    basis = _with_fixed_signs(solution.basis.to(dtype))
    certified, energy_excess = _judged(problem, solution.short_vectors, basis)
    return MinorSubspace(
        basis=basis.to(weight.device),
        singular_values=(solution.singular_values / scale).to(dtype=dtype, device=weight.device),
        method=solution.method,
        certified=certified,
        energy_excess=energy_excess,
    )


def _with_fixed_signs(basis: torch.Tensor) -> torch.Tensor:
    """The entry of largest magnitude of each column made positive; the first one where several are."""
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return (basis * largest.sign()).contiguous()


def _judged(problem: _Problem, short_vectors: torch.Tensor, basis: torch.Tensor) -> tuple[bool, float]:
    """``certified`` and ``energy_excess`` as MinorSubspace defines them."""
    product = transposed_image if problem.basis_is_long else image
    energy = product(problem.tall, basis).square().sum().item()
    certificate = certify(problem.gram, short_vectors, problem.norm)
    least = max(0.0, certificate.ritz_sum - certificate.deficit)  # proven: Σσ² is at least this
    resolved = problem.rank * problem.floor
    excess = max(0.0, energy - least)
    certified = certificate.passed and excess <= CERTIFIED_EXCESS * least + resolved
    reference = max(least, resolved)
    return certified, excess / reference if reference else 0.0
