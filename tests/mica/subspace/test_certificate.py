"""The certificate accepts every minor subspace and refuses every other one."""

import math

import pytest
import torch

from mica.subspace.batched import BatchGram
from mica.subspace.certificate import ROUNDING, Certificate, certify
from mica.subspace.host import HostGram
from mica.subspace.krylov import resolution
from mica.subspace.result import is_certified
from tests.support.judging import columns, gram_of, random
from tests.support.spectra import NULL, RANK, SPECTRA, weight

SIZE = 60
# Distinct eigenvalues well above rounding: another subspace is a wrong one.
SEPARATED = ["gaussian", "hard edge", "row scales", "tail x 1e-6", "times 1e4", "times 1e-4"]


def eigenpairs(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A tall weight, and the eigenvalues and eigenvectors of its Gram matrix."""
    tall = weight(name, SIZE, SIZE + 20).T
    return tall, *torch.linalg.eigh(gram_of(tall))


def certificate(matrix: torch.Tensor, vectors: torch.Tensor, norm_share: float = 1.0) -> Certificate:
    """That of a ``HostGram``; a ``BatchGram`` gives the same, whatever else is in its batch."""
    norm = norm_share * torch.linalg.matrix_norm(gram_of(matrix), 2)
    single = certify(HostGram(matrix), columns(vectors), norm)
    other = torch.linalg.qr(vectors.flip(0)).Q
    batch = BatchGram(torch.stack([matrix, matrix.flip(1) * 2]))
    pair = certify(batch, torch.stack([vectors, other]), torch.stack([norm, 4 * norm]))
    assert pair.passed.tolist() == [single.passed.item()] * 2
    floor = vectors.shape[1] * resolution(len(vectors), norm).item()
    for mine, its in zip(single[1:3], pair[1:3], strict=True):
        for value, factor in zip(its.tolist(), (1, 4), strict=True):
            assert value == pytest.approx(factor * mine.item(), rel=1e-9, abs=4 * floor)
    return single


def in_two_bases(vectors: torch.Tensor):
    """Orthonormal ones of one span."""
    count = vectors.shape[1]
    return vectors, vectors @ torch.linalg.qr(random(count, count)).Q


@pytest.mark.parametrize("norm_share", [0.75, 1.0])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, RANK, SIZE - 1, SIZE])
def test_accepts_the_minor_subspace_in_any_basis(name, rank, norm_share):
    tall, values, vectors = eigenpairs(name)
    floor = resolution(SIZE, values[-1])
    for minor in in_two_bases(vectors[:, :rank]):
        proof = certificate(tall, minor, norm_share=norm_share)
        assert proof.passed
        # Σ(θ − μ) counts the slack and, in a proper basis of any kind, nothing else.
        assert rank * ROUNDING * norm_share * floor <= proof.deficit <= rank * floor
        assert abs(proof.ritz_sum - values[:rank].sum()) <= rank * floor


@pytest.mark.parametrize("name", SEPARATED)
@pytest.mark.parametrize("missed", range(RANK))
@pytest.mark.parametrize("norm_share", [0.75, 1.0])
def test_refuses_a_subspace_that_misses_one_vector(name, missed, norm_share):
    """One minor vector replaced by the next, by a middle and by the top one."""
    tall, _, vectors = eigenpairs(name)
    for substitute in (RANK, RANK + 1, SIZE // 2, SIZE - 1):
        chosen = [i for i in range(RANK) if i != missed] + [substitute]
        for wrong in in_two_bases(vectors[:, chosen]):
            proof = certificate(tall, wrong, norm_share=norm_share)
            assert not proof.passed
            assert proof.deficit == math.inf


@pytest.mark.parametrize("name", [*sorted(SPECTRA.keys() - NULL - {"flat"}), "rank 5"])
def test_refuses_or_bounds_any_other_subspace(name):
    """Inside a cluster other eigenvectors are as good, and accepted with a deficit that says so."""
    tall, values, vectors = eigenpairs(name)
    floor = resolution(SIZE, values[-1])
    for _ in range(30 if name not in NULL else 0):
        chosen = torch.randperm(2 * RANK)[:RANK]
        proof = certificate(tall, vectors[:, chosen])
        excess = (values[chosen].sum() - values[:RANK].sum()).item()
        assert proof.deficit >= excess - 0.05 * floor
        if excess > RANK * floor:
            assert not proof.passed
    for seed in range(20):
        assert not certificate(tall, torch.linalg.qr(random(SIZE, RANK, seed=seed)).Q).passed


@pytest.mark.parametrize("name", ["gaussian", "hard edge", "row scales"])
@pytest.mark.parametrize("towards", [RANK, SIZE - 1])
@pytest.mark.parametrize("angle", [1e-8, 1e-6, 1e-4, 1e-2, 1.0])
def test_the_deficit_bounds_the_true_one_of_a_tilted_subspace(name, towards, angle):
    tall, values, vectors = eigenpairs(name)
    floor = RANK * resolution(SIZE, values[-1]).item()
    for index in range(0, RANK, 3):
        tilted = vectors[:, :RANK].clone()
        tilted[:, index] = math.cos(angle) * vectors[:, index] + math.sin(angle) * vectors[:, towards]
        energy = (tilted.T @ gram_of(tall) @ tilted).trace().item()
        true_deficit = math.sin(angle) ** 2 * (values[towards] - values[index]).item()
        proof = certificate(tall, tilted)
        assert proof.deficit >= true_deficit - 0.05 * floor
        assert proof.ritz_sum == pytest.approx(energy, rel=1e-12, abs=floor)


def test_everything_is_minor_of_a_zero_matrix_which_vouches_for_no_other_of_its_batch():
    proof = certificate(torch.zeros(12, 9), torch.eye(9, 3, dtype=torch.float64))
    assert proof.passed
    assert proof.deficit == proof.ritz_sum == 0

    tall, _, right = eigenpairs("gaussian")
    matrices = torch.stack([torch.zeros(SIZE + 20, SIZE), tall, tall])
    vectors = torch.stack([right[:, :RANK], right[:, :RANK], right[:, 1 : RANK + 1]])
    proof = certify(BatchGram(matrices), vectors, torch.linalg.matrix_norm(gram_of(matrices), 2))
    assert proof.passed.tolist() == [True, True, False]
    assert proof.deficit.isinf().tolist() == [False, False, True]


# Results


def test_the_allowance_is_a_share_of_the_energy_and_a_resolution_a_vector():
    for excess, energy, rank, unit in ((1e-5 * 7 + 3 * 0.1, 7, 3, 0.1), (8e-3, 0.0, 8, 1e-3)):
        assert is_certified(excess, energy, rank, unit)
        assert not is_certified(excess + 1e-5 * unit, energy, rank, unit)
    excess, energies = torch.tensor([2e-5, 2e-5]), torch.tensor([1.0, 3.0])
    assert is_certified(excess, energies, 1, torch.tensor([0.0, 0.0])).tolist() == [False, True]
