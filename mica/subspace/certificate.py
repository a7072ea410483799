"""The proof, by an inertia test, that a subspace is the minor one up to a stated energy."""

from typing import NamedTuple

import torch

# Share of the floor by which the tested eigenvalue bound stays below the largest Ritz value, so that a
# cluster that crosses the cut still passes: the test spectra need up to 0.08 for n from 2 to 1000 (most
# where the Gram has rank 1). And the share allowed for the rounding of Cholesky and of the Gram.
SLACK = 0.25
ROUNDING = 0.25

_POWER_STEPS = 12
_POWER_VECTORS = 4


class Certificate(NamedTuple):
    """``passed``: the inertia test held. ``deficit``: Σθ − Σλ is at most this (inf where it did not hold).

    ``ritz_sum`` is Σθ, the energy of the subspace as the Gram sees it; ``floor`` the resolution of one θ.
    """

    passed: bool
    deficit: float
    ritz_sum: float
    floor: float


def spectral_norm(matrix: torch.Tensor) -> float:
    """‖C‖₂ of a symmetric positive semidefinite fp64 matrix by block power iteration, a little from below.

    The start is drawn from its own seeded generator on the CPU: the same on every call and device.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    # As rows: 0.09 against 0.23 ms a step for n = 576.
    start = torch.randn(
        _POWER_VECTORS, matrix.shape[0], dtype=torch.float64, generator=generator, device="cpu"
    )
    vectors = start.to(matrix.device)
    norms = vectors.norm(dim=1, keepdim=True)
    for _ in range(_POWER_STEPS):
        vectors = vectors / norms.clamp_min(torch.finfo(torch.float64).tiny) @ matrix
        norms = vectors.norm(dim=1, keepdim=True)
    return norms.max().item()


def resolution_floor(short_features: int, norm: float) -> float:
    """floor = 4 √n ε₆₄ ‖C‖₂: eigenvalues of the (n, n) Gram matrix C closer than this are one to fp64."""
    return 4 * short_features**0.5 * torch.finfo(torch.float64).eps * norm


def certify(gram: torch.Tensor, vectors: torch.Tensor, norm: float) -> Certificate:
    """Bound how far ``vectors`` (n, r), orthonormal, are from the r smallest eigenpairs of ``gram`` (n, n).

    ``norm`` is ``spectral_norm(gram)``; both tensors are fp64.

    With C the Gram, X the vectors, H = Xᵀ C X with eigenvalues (Ritz values) θ₁ ≤ … ≤ θ_r and
    R = C X − X H: if C + 2 ‖C‖ X Xᵀ − μ I has a Cholesky factor, C restricted to the complement of X has no
    eigenvalue below μ. C differs by [[0, Rᵀ], [R, 0]] from a matrix whose eigenvalues are the θ and
    ones ≥ μ, hence (Weyl, summed by Lidskii; ‖R‖_* ≤ √r ‖R‖_F) for the r smallest eigenvalues λ of C

        Σ θᵢ − Σ λᵢ  ≤  Σ max(0, θᵢ − μ) + √r ‖R‖_F + r · ROUNDING · floor,     μ = θ_r − SLACK · floor.

    The last term stands for the backward error of Cholesky and of the products; up to it the bound is
    rigorous. No gap is assumed: inside a cluster any basis of the right energy passes.
    """
    n, rank = vectors.shape
    floor = resolution_floor(n, norm)
    products = gram @ vectors
    small = vectors.T @ products
    ritz_values = torch.linalg.eigvalsh((small + small.T) / 2)
    ritz_sum = small.trace().item()
    if norm == 0:  # every subspace of a zero matrix is minor
        return Certificate(True, 0.0, ritz_sum, floor)

    bound = ritz_values[-1].item() - SLACK * floor
    # With nothing outside the subspace there is nothing to test.
    passed = rank == n or _is_positive_definite(_shifted(gram, vectors, norm, bound))
    if not passed:
        return Certificate(False, float("inf"), ritz_sum, floor)
    residual = (products - vectors @ small).norm().item()
    above = (ritz_values - bound).clamp_min(0).sum().item()
    return Certificate(True, above + rank**0.5 * residual + rank * ROUNDING * floor, ritz_sum, floor)


def _shifted(gram: torch.Tensor, vectors: torch.Tensor, norm: float, bound: float) -> torch.Tensor:
    """C + 2 ‖C‖ X Xᵀ − μ I; twice, because ``norm`` may be less than μ by a few per cent."""
    shifted = torch.addmm(gram, vectors, vectors.T, alpha=2 * norm)
    shifted.diagonal().sub_(bound)
    return shifted


def _is_positive_definite(matrix: torch.Tensor) -> bool:
    return torch.linalg.cholesky_ex(matrix).info.item() == 0
