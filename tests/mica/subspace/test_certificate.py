"""The certificate accepts every minor subspace and refuses every other one."""

import pytest
import torch
from spectra import RANK, SPECTRA, weight

from mica.subspace.certificate import certify, resolution_floor, spectral_norm

SIZE = 60


def gram_of(name: str) -> torch.Tensor:
    matrix = weight(name, SIZE, SIZE + 20).double()
    return matrix @ matrix.T


def certificate(gram: torch.Tensor, vectors: torch.Tensor):
    return certify(gram, vectors, spectral_norm(gram))


def rotated(vectors: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Another orthonormal basis of the same span."""
    generator = torch.Generator().manual_seed(seed)
    count = vectors.shape[1]
    return vectors @ torch.linalg.qr(torch.randn(count, count, dtype=vectors.dtype, generator=generator)).Q


@pytest.mark.parametrize("name", SPECTRA)
def test_the_norm_is_nearly_the_largest_eigenvalue(name):
    gram = gram_of(name)
    norm = torch.linalg.matrix_norm(gram, 2).item()
    assert 0.8 * norm <= spectral_norm(gram) <= (1 + 1e-12) * norm


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, RANK, SIZE - 1, SIZE])
def test_accepts_the_minor_subspace_in_any_basis(name, rank):
    gram = gram_of(name)
    values, vectors = torch.linalg.eigh(gram)
    floor = resolution_floor(SIZE, torch.linalg.matrix_norm(gram, 2).item())
    for minor in (vectors[:, :rank], rotated(vectors[:, :rank])):
        proof = certificate(gram, minor)
        assert proof.passed
        # Σ(θ − μ) counts the slack and, in a proper basis of any kind, nothing else.
        below_cut = (values[:rank] - values[rank - 1]).abs().sum().item()
        assert proof.deficit <= rank * floor + below_cut
        assert abs(proof.ritz_sum - values[:rank].sum().item()) <= rank * floor


@pytest.mark.parametrize(
    "name", ["gaussian", "hard edge", "row scales", "tail x 1e-6", "times 1e4", "times 1e-4"]
)
@pytest.mark.parametrize("missed", range(RANK))
def test_refuses_a_subspace_that_misses_one_vector(name, missed):
    """One minor vector replaced by the next, by a middle and by the top one."""
    gram = gram_of(name)
    _, vectors = torch.linalg.eigh(gram)
    for substitute in (RANK, SIZE // 2, SIZE - 1):
        chosen = [i for i in range(RANK) if i != missed] + [substitute]
        assert not certificate(gram, vectors[:, chosen]).passed
        assert not certificate(gram, rotated(vectors[:, chosen])).passed


@pytest.mark.parametrize("name", ["gaussian", "hard edge", "row scales"])
@pytest.mark.parametrize("angle", [1e-4, 1e-2, 1.0])
def test_the_deficit_bounds_the_true_one_of_a_tilted_subspace(name, angle):
    gram = gram_of(name)
    values, vectors = torch.linalg.eigh(gram)
    cosine, sine = torch.cos(torch.tensor(angle)).item(), torch.sin(torch.tensor(angle)).item()
    tilted = vectors[:, :RANK].clone()
    tilted[:, 2] = cosine * vectors[:, 2] + sine * vectors[:, -1]
    proof = certificate(gram, tilted)
    true_deficit = (tilted.T @ gram @ tilted).trace().item() - values[:RANK].sum().item()
    assert proof.deficit >= true_deficit
    assert proof.ritz_sum == pytest.approx((tilted.T @ gram @ tilted).trace().item())


def test_refuses_random_subspaces():
    gram = gram_of("gaussian")
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        vectors = torch.linalg.qr(torch.randn(SIZE, RANK, dtype=torch.float64, generator=generator)).Q
        assert not certificate(gram, vectors).passed


def test_everything_is_minor_of_a_zero_matrix():
    gram = torch.zeros(9, 9, dtype=torch.float64)
    assert certificate(gram, torch.eye(9, 3, dtype=torch.float64)) == (True, 0.0, 0.0, 0.0)
