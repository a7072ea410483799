"""Smallest eigenpairs, by the partial and by the full solver."""

import pytest
import scipy.linalg
import torch

from mica.subspace import eigen


def symmetric(n: int, values: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    vectors = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    product = vectors * values @ vectors.T
    return (product + product.T) / 2


SPECTRA = {
    "distinct": lambda n: torch.linspace(1, 2, n, dtype=torch.float64),
    "equal": lambda n: torch.ones(n, dtype=torch.float64),
    "mostly null": lambda n: torch.arange(n, dtype=torch.float64).sub(n - 4).clamp_min(0),
    "zero": lambda n: torch.zeros(n, dtype=torch.float64),
}


def check(matrix: torch.Tensor, count: int) -> None:
    values, vectors = eigen.smallest_eigenpairs(matrix, count)
    expected = torch.linalg.eigvalsh(matrix)[:count]
    assert values.shape == (count,)
    assert vectors.shape == (matrix.shape[0], count)
    tolerance = 1e-13 * matrix.shape[0] * max(1.0, matrix.norm().item())
    assert (values - expected).abs().max() <= tolerance
    assert (vectors.T @ vectors - torch.eye(count, dtype=torch.float64)).abs().max() <= 1e-13
    assert (matrix @ vectors - vectors * values).norm() <= tolerance


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("n", "count"), [(1, 1), (40, 5), (150, 1), (150, 20), (150, 60), (150, 150)])
def test_smallest_eigenpairs(name, n, count):
    check(symmetric(n, SPECTRA[name](n)), count)


def test_the_partial_solver_is_used_and_may_fail(monkeypatch):
    calls = []

    def failing(*arguments, **keywords):
        calls.append(keywords["subset_by_index"])
        raise scipy.linalg.LinAlgError("no convergence")

    matrix = symmetric(150, SPECTRA["distinct"](150))
    monkeypatch.setattr(scipy.linalg, "eigh", failing)
    check(matrix, 20)
    assert calls == [[0, 19]]
