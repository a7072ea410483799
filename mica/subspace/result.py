"""What a solver returns: the basis, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A result is certified when its proven energy excess is at most this share of the wanted energy, plus
# one resolution for each vector.
CERTIFIED_EXCESS = 1e-5

# A squared singular value below this many resolutions is rounding noise: the Gram does not show its vector.
NULL_RESOLUTIONS = 16


@dataclass(frozen=True, eq=False)
class MinorSubspace:
    """The minor singular subspace of a weight (out_features, in_features).

    basis: (out_features, rank), orthonormal columns, singular values descending, the entry of largest
        magnitude in each column positive; fp64 for an fp64 weight, else fp32; on the weight's device.
    singular_values: (rank,), descending, those of the columns of ``basis``; dtype and device as basis.
    method: what produced the result after fall-backs: "krylov", "gram" or "svd".
    certified: proven, up to fp64 rounding, that the energy ‖weightᵀ basis‖² of the basis as returned
        exceeds the smallest possible one, Σσ², by at most 1e-5 Σσ² + rank · resolution.
    energy_excess: the upper bound on (‖weightᵀ basis‖² − Σσ²) / max(Σσ², rank · resolution); proven where
        ``certified``.
    resolution: 4 √min(out_features, in_features) · ε₆₄ · ‖weight‖², the difference of two squared singular
        values below which fp64 cannot tell them apart.
    null_count: columns of the basis that a tall weight does not determine, because their singular values are
        numerically null; they are an arbitrary orthonormal completion.

    Of a batch (..., out_features, in_features), ``basis`` is (..., out_features, rank), ``singular_values``
    (..., rank), and the others describe the worst matrix: ``method`` is the last resort that was needed,
    ``certified`` holds for all, ``energy_excess``, ``resolution`` and ``null_count`` are the largest.
    """

    basis: torch.Tensor
    singular_values: torch.Tensor
    method: str
    certified: bool
    energy_excess: float
    resolution: float
    null_count: int = 0


def is_certified(excess, energy, rank: int, resolution):
    """Whether a proven, absolute energy excess is small enough; ``energy`` is Σσ². Numbers or tensors."""
    return excess <= CERTIFIED_EXCESS * energy + rank * resolution
