"""``minor_subspace``: the left singular vectors of a weight that have the smallest singular values."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mica.subspace.certificate import Certificate, certify, resolution_floor
from mica.subspace.eigen import smallest_eigenpairs
from mica.subspace.gram import gram, image, transposed_image

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A result is certified when its proven energy excess is at most this share of the wanted energy, plus
# one resolution floor for each vector.
CERTIFIED_EXCESS = 1e-5

# A Ritz value below this many floors is rounding noise: the Gram does not show its singular vector.
NULL_FLOORS = 16


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
    """One weight, seen as its tall (long, short) view, and the fp64 Gram of its short side."""

    tall: torch.Tensor
    gram: torch.Tensor
    rank: int
    basis_is_long: bool  # out_features > in_features: the wanted vectors live on the long side


class _Solution(NamedTuple):
    """fp64: the vectors on the short side (short, rank), the wanted ones, and their singular values."""

    short_vectors: torch.Tensor
    basis: torch.Tensor
    singular_values: torch.Tensor
    method: str


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
    matrix, exponent = _prepared(weight.detach())

    basis_is_long = matrix.shape[0] > matrix.shape[1]
    tall = matrix if basis_is_long else matrix.T
    problem = _Problem(tall, gram(tall), rank, basis_is_long)
    result, certificate = _attempt(problem, METHODS[method], weight.dtype)
    if result.method != "svd" and not result.certified:
        result, certificate = _attempt(problem, _solve_svd, weight.dtype)
    del certificate
    return result


def _check_weight(weight: torch.Tensor) -> None:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a torch.Tensor, but got {type(weight).__name__}.")
    if weight.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"weight must be of dtype float64, float32, bfloat16 or float16, but got {weight.dtype}.")
    if weight.ndim != 2:
        raise ValueError(f"weight must be 2-D (out_features, in_features), but got shape {tuple(weight.shape)}.")
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


