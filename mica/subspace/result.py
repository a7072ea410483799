"""What a solver returns: the basis, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A result is certified if its proven energy excess is at most this share of the smallest energy, plus one
# resolution for each vector.
CERTIFIED_EXCESS = 1e-5

# A squared singular value below this many resolutions is rounding noise: the Gram does not show its vector.
NULL_RESOLUTIONS = 16


@dataclass(frozen=True, eq=False, repr=False)
class MinorSubspace:
    """The minor singular subspace of a weight (out_features, in_features).

    Attributes:
        basis: The vectors, (out_features, rank), as orthonormal columns by descending singular value. The
            entry of largest magnitude in each column is positive. The dtype is fp64 for an fp64 weight, else
            fp32, the device that of the weight.
        singular_values: The singular values of the columns, (rank,), descending; dtype and device as
            ``basis``.
        method: The method that produced the result after all fall-backs: "krylov", "gram" or "svd".
        certified: Whether it is proven, up to fp64 rounding, that the energy ‖weightᵀ basis‖² of the basis as
            returned exceeds the smallest possible one, Σσ², by at most 1e-5 Σσ² + rank · resolution.
        energy_excess: An upper bound on (‖weightᵀ basis‖² − Σσ²) / max(Σσ², rank · resolution), which is
            proven where ``certified`` holds.
        resolution: The difference of two squared singular values below which fp64 cannot tell them apart, 4
            √min(out_features, in_features) · ε₆₄ · ‖weight‖².
        null_count: The number of columns of the basis that a tall weight does not determine, because their
            singular values are numerically null. They are an arbitrary orthonormal completion.
    """

    basis: Tensor
    singular_values: Tensor
    method: str
    certified: bool
    energy_excess: float
    resolution: float
    null_count: int = 0

    def __repr__(self) -> str:
        basis = f"{tuple(self.basis.shape)} {self.basis.dtype} on {self.basis.device}"
        proof = f"certified={self.certified}, energy_excess={self.energy_excess:.1e}"
        return f"MinorSubspace(basis {basis}, method={self.method!r}, {proof}, null_count={self.null_count})"


def move(result: MinorSubspace, device: str | torch.device) -> MinorSubspace:
    """``result`` with its tensors on ``device``."""
    return replace(result, basis=result.basis.to(device), singular_values=result.singular_values.to(device))


def is_certified(excess, energy, rank: int, resolution):
    """Whether a proven energy excess is small enough. All arguments are numbers or tensors of one shape.

    Args:
        excess: The proven, absolute excess of the energy.
        energy: The smallest possible energy, Σσ².
        rank: The number of vectors.
        resolution: As in ``MinorSubspace``.
    """
    return excess <= CERTIFIED_EXCESS * energy + rank * resolution
