"""The methods and what each falls back to; from vectors to triplets and to a judgement on the basis."""

import math

import pytest
import torch

from mica.subspace import candidate as module
from mica.subspace import krylov, methods
from mica.subspace.batched import BatchGram
from mica.subspace.candidate import Problem, candidate, judge
from mica.subspace.certificate import ROUNDING
from mica.subspace.host import HostGram
from tests.support.judging import columns, energy, random, resolution, truth
from tests.support.spectra import RANK, weight
from tests.support.tolerances import error

SHAPES = [(60, 40), (40, 60), (50, 50)]
of_each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
on_one_and_a_batch = pytest.mark.parametrize("batch", [False, True])


def stated(matrix: torch.Tensor, rank: int = RANK) -> Problem:
    """The problem of one matrix as on the host, or of a batch as on a device."""
    return Problem(matrix, HostGram if matrix.ndim == 2 else BatchGram, rank)


def exact_candidate(state: Problem, extra: int = 0):
    """From the exact short vectors, ``extra`` places above the smallest."""
    _, values, right = torch.linalg.svd(state.tall.double(), full_matrices=False)
    last = right.shape[-2] - extra
    smallest = slice(last - RANK, last)
    vectors = columns(right[..., smallest, :].mT.flip(-1))
    squares = values.square()
    return candidate(state, squares[..., smallest].flip(-1), vectors, squares[..., 0])


# The methods


@pytest.mark.parametrize(
    ("size", "rank", "expected"),
    [
        (4096, 16, "krylov"), (4096, 128, "krylov"), (4096, 1024, "gram"), (4096, 3072, "gram"),
        (4096, 3073, "gram"), (4096, 256, "krylov"), (2048, 128, "gram"), (1024, 64, "gram"),
        (1001, 16, "krylov"), (1000, 16, "gram"), (1024, 768, "gram"),
        (1024, 1024, "gram"), (40, 30, "gram"), (1, 1, "gram"), (2, 1, "gram"),
    ],
)  # fmt: skip
def test_the_way_that_auto_takes_and_what_it_falls_back_to(size, rank, expected, monkeypatch):
    monkeypatch.setattr(krylov, "FIRST_CHECK", 7)
    whole = ["krylov", "gram", "svd"]
    assert methods.chain(size, rank) == whole[whole.index(expected) :]


def test_each_method_tells_the_norm_and_only_krylov_pays_for_shifts(calls_of):
    bounds = calls_of(krylov, "bounds")
    matrix = weight("gaussian", 240, 220)
    exact = truth(matrix).squares[0].item()
    for method, tolerance in (("svd", 1e-12), ("gram", 1e-12), ("krylov", 0.25)):
        norm = methods.BY[method](stated(matrix, 2)).norm
        assert norm.item() == pytest.approx(exact, rel=tolerance)
        assert len(bounds) == (method == "krylov")


# Triplets


@of_each_shape
@pytest.mark.parametrize("name", ["gaussian", "graded to 1.6e-6", "row scales", "times 1e-4"])
@on_one_and_a_batch
def test_triplets_of_a_span(name, shape, batch):
    matrix = weight(name, *shape)
    matrix = torch.stack([matrix, matrix.flip(0)]) if batch else matrix
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    triplets = exact_candidate(stated(matrix))
    assert error(triplets.singular_values, values[..., -RANK:]) <= 1e-9
    short = right.mT if shape[0] > shape[1] else left
    for vectors, exact in ((triplets.basis, left[..., -RANK:]), (triplets.short_vectors, short[..., -RANK:])):
        cosines = (exact.mT @ vectors).abs()
        assert error(cosines, torch.eye(RANK, dtype=torch.float64).expand_as(cosines)) <= 1e-7


# The judgement


@on_one_and_a_batch
@of_each_shape
@pytest.mark.parametrize("name", ["gaussian", "hard edge", "graded to 1.6e-6"])
@pytest.mark.parametrize("extra", [0, 1])
def test_the_judgement_on_right_and_wrong_vectors(shape, name, batch, extra):
    matrix = weight(name, *shape)
    matrix = torch.stack([matrix, 2 * matrix]) if batch else matrix
    state = stated(matrix)
    judgement = judge(state, exact_candidate(state, extra))
    assert judgement.basis.dtype == torch.float32
    assert (judgement.certified == (not extra)).all()
    bases, singles = judgement.basis.reshape(-1, shape[0], RANK), matrix.reshape(-1, *shape)
    for basis, single, reported in zip(bases, singles, judgement.energy_excess.reshape(-1), strict=True):
        squares = truth(single).squares
        least, floor = squares[-RANK:].sum(), RANK * resolution(len(squares), squares[0])
        excess = (energy(single, basis).sum() - least) / max(least, floor)
        if extra == 0:
            assert excess - 1e-9 <= reported <= 1 + 1e-5
        else:  # nothing is proven of it
            assert reported == math.inf or reported >= excess


def test_no_triplets_of_a_vector_that_the_gram_does_not_show():
    values = torch.ones(40, dtype=torch.float64)
    values[-1] = 1e-10  # its square is below the rounding of the Gram
    long, short = (torch.linalg.qr(random(rows, 40).double()).Q for rows in (60, 40))
    state = stated(long * values @ short.T)
    assert exact_candidate(state) is None
    assert exact_candidate(state, extra=1) is not None


def test_what_the_gram_does_not_see_counts_as_energy():
    """And what it shows is above the true one by the share that the certificate allows for rounding."""
    matrix = weight("gaussian", 40, 60)
    state = stated(matrix)
    triplets = exact_candidate(state)
    assert triplets.resolved
    basis = triplets.basis.float()
    above = module.energy_of(state, triplets, basis, torch.ones(1, RANK)) - energy(matrix, basis).sum()
    assert above == pytest.approx((RANK * ROUNDING * resolution(40, triplets.norm)).item(), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_one_and_a_batch
@pytest.mark.parametrize("name", ["graded to 1e-7", "graded to 1.6e-6", "tail x 1e-6", "rank 5", "hard edge"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_energy_where_the_gram_does_not_resolve_it(name, shape, batch, dtype):
    """To the digits of a product with the weight itself, from the Gram of what rounding has changed alone."""
    matrix = weight(name, *shape)
    state = stated(torch.stack([matrix, 2 * matrix]) if batch else matrix)
    triplets = exact_candidate(state)._replace(resolved=False)
    basis = triplets.basis.to(dtype)
    signs = module.signs_of(basis)
    values = module.energy_of(state, triplets, basis * signs, signs).reshape(-1)
    floor = RANK * resolution(shape[0], triplets.norm).reshape(-1)
    for position, value in enumerate(values):
        single = (basis * signs)[position] if batch else basis
        exact = energy((1 + position) * matrix, single).sum()
        assert -1e-12 * exact <= value - exact <= 1e-9 * exact + 1e-2 * floor[position]
