"""What a minor subspace is judged by: energy and containment, for vectors mean nothing inside a cluster."""

from typing import NamedTuple

import torch

from mica.subspace import MinorSubspace
from tests.support.tolerances import error


class Truth(NamedTuple):
    """fp64 left singular vectors (out, n) of a weight and its squared singular values (n), descending."""

    vectors: torch.Tensor
    squares: torch.Tensor


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """fp64, column-major as the vectors of a ``HostGram`` are."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*shape[:-2], shape[-1], shape[-2])
    return torch.randn(shape, dtype=torch.float64, generator=generator).mT


def columns(matrix: torch.Tensor) -> torch.Tensor:
    """The same, column-major."""
    return matrix.mT.contiguous().mT


def gram_of(tall: torch.Tensor) -> torch.Tensor:
    return tall.double().mT @ tall.double()


def dense(gram) -> torch.Tensor:
    """What ``apply`` of a ``HostGram`` or a ``BatchGram`` multiplies with."""
    unit = torch.eye(gram.size, dtype=torch.float64)
    return gram.apply(columns(unit.expand(*gram.batch_shape, gram.size, gram.size)))


def assert_orthonormal(basis: torch.Tensor) -> None:
    """By the relative Frobenius error of each matrix of a batch."""
    unit = torch.eye(basis.shape[-1], dtype=torch.float64)
    for each in basis.double().reshape(-1, *basis.shape[-2:]):
        assert error(each.T @ each, unit) <= 1e-13


def truth(matrix: torch.Tensor) -> Truth:
    vectors, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Truth(vectors, values.square())


def resolution(size: int, norm: float) -> float:
    """What fp64 resolves of a squared singular value of a weight of norm √``norm``."""
    return 4 * size**0.5 * torch.finfo(torch.float64).eps * norm


def energy(matrix: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """‖Wᵀb‖² of each column b."""
    return (matrix.double().T @ basis.double()).square().sum(0)


def sine(vectors: torch.Tensor, basis: torch.Tensor) -> float:
    """Largest sine between the columns' span of ``basis`` and that of the orthonormal ``vectors``."""
    basis = basis.double()
    return torch.linalg.matrix_norm(basis - vectors @ (vectors.T @ basis), 2).item()


def judge(
    matrix: torch.Tensor, result: MinorSubspace, determined: bool = True, exact: Truth | None = None
) -> None:
    """Orthonormal, no more energy than 1e-5 above the least, inside the few smallest vectors, in order.

    ``determined``: the weight fixes the subspace's null vectors too (it does not, of a tall weight).
    """
    basis, rank = result.basis, result.basis.shape[1]
    vectors, squares = exact or truth(matrix)
    floor = resolution(len(squares), squares[0].item())
    least = squares[-rank:].sum().item()

    assert basis.shape == (matrix.shape[0], rank)
    assert basis.is_contiguous()
    assert not basis.requires_grad
    identity = torch.eye(rank, dtype=torch.float64)
    assert (basis.double().T @ basis.double() - identity).abs().max() <= 1e-6

    energies = energy(matrix, basis)
    excess = energies.sum().item() - least
    assert excess <= 1e-5 * least + rank * floor
    # The reported figure bounds the true one, up to the rounding of this very comparison.
    assert excess <= result.energy_excess * max(least, rank * floor) + 0.05 * rank * floor
    assert 0.75 * floor <= result.resolution <= (1 + 1e-6) * floor

    count = min(rank + 16, len(squares))
    allowed = squares <= squares[-count] * (1 + 1e-4) + floor
    # Never a direction that carries more energy; and, where the weight determines all, none outside it.
    if not allowed.all():
        assert torch.linalg.matrix_norm(vectors[:, ~allowed].T @ basis.double(), 2) <= 1e-3
    if determined:
        assert sine(vectors[:, allowed], basis) <= 1e-3

    if determined and rank < len(squares):
        gap = squares[-rank - 1] - squares[-rank]
        angle = sine(vectors[:, -rank:], basis)
        if gap > 1e-4 * squares[-rank] + floor and angle > 1e-4:
            single = torch.linalg.svd(matrix.float(), full_matrices=False).U[:, -rank:]
            assert angle <= sine(vectors[:, -rank:], single)

    # Columns in order, each with the singular value reported for it.
    assert result.singular_values.shape == (rank,)
    assert result.singular_values.dtype == basis.dtype
    assert (result.singular_values.diff() <= 0).all()
    reported = result.singular_values.double().square()
    tolerance = 1e-5 * squares[-rank:] + floor
    assert ((reported - squares[-rank:]).abs() <= tolerance).all()
    assert ((energies - squares[-rank:]).abs() <= tolerance).all()

    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
