"""The proof, by an inertia test, that a subspace is the minor one up to a stated energy."""

from typing import NamedTuple

import torch
from torch import Tensor

from mica.subspace.krylov import residual_of, resolution

# Share of the resolution by which the tested eigenvalue bound stays below the largest Ritz value, so that a
# cluster that crosses the cut still passes: the test spectra need up to 0.08 for n from 2 to 1000 (most
# where the Gram has rank 1).
SLACK = 0.25

# Share of the resolution that is allowed for the rounding of Cholesky and of the Gram.
ROUNDING = 0.25


class Certificate(NamedTuple):
    """The outcome of `certify`: tensors (batch) on the host.

    Attributes:
        passed: Whether the inertia test held, as booleans.
        deficit: In fp64; where the test held, Σθ − Σλ is at most this.
        ritz_sum: In fp64, Σθ: the energy of the subspace as the Gram matrix sees it.
        read: The other tensors that were read from the device at the same time.
    """

    passed: Tensor
    deficit: Tensor
    ritz_sum: Tensor
    read: tuple[Tensor, ...] = ()


def certify(gram, vectors: Tensor, norm: Tensor, *along: Tensor) -> Certificate:
    """Bound how far ``vectors`` (batch, n, r), orthonormal, are from the r smallest eigenpairs of ``gram``.

    ``gram`` is a ``HostGram`` or a ``BatchGram``, whose factor is overwritten; ``norm`` (batch) is ‖C‖, or
    up to a quarter less, on the host. ``along`` are other fp64 tensors to be read there at the same time.

    With C the Gram, X the vectors, H = Xᵀ C X with eigenvalues (Ritz values) θ₁ ≤ … ≤ θ_r and
    R = C X − X H: if C + 2 ‖C‖ X Xᵀ − μ I has a Cholesky factor, C restricted to the complement of X has no
    eigenvalue below μ. C differs by [[0, Rᵀ], [R, 0]] from a matrix whose eigenvalues are the θ and
    ones ≥ μ, hence (Weyl, summed by Lidskii; ‖R‖_* ≤ √r ‖R‖_F) for the r smallest eigenvalues λ of C

        Σ θᵢ − Σ λᵢ  ≤  Σ max(0, θᵢ − μ) + √r ‖R‖_F + r · ROUNDING · floor,     μ = θ_r − SLACK · floor,

    with floor = ``resolution``. The last term stands for the backward error of Cholesky and of the products;
    up to it the bound is rigorous.
    No gap is assumed: inside a cluster any basis of the right energy passes.
    """
    n, rank = vectors.shape[-2:]
    floor = resolution(n, norm)
    residual, small, *along = gram.read(*residual_of(gram, vectors), *along)
    ritz_values = torch.linalg.eigvalsh((small + small.mT) / 2)
    ritz_sum = ritz_values.sum(-1)
    bound = ritz_values[..., -1] - SLACK * floor
    above = (ritz_values - bound.unsqueeze(-1)).clamp_min(0).sum(-1)
    deficit = above + rank**0.5 * residual + rank * ROUNDING * floor
    passed = norm == 0  # every subspace of a zero matrix is minor
    if rank == n:  # nothing outside the subspace, nothing to test
        passed = torch.ones_like(passed)
    if not passed.all():
        passed = passed | gram.exceeds(vectors, 2 * norm, bound)
    return Certificate(passed, torch.where(passed, deficit, torch.inf), ritz_sum, tuple(along))
