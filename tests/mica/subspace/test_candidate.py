"""From vectors to triplets and to a judgement on the basis as it is returned."""

import math

import pytest
import torch

from mica.subspace import candidate as module
from mica.subspace.batched import BatchGram
from mica.subspace.candidate import Candidate, Problem, candidate, judged, problem
from mica.subspace.certificate import ROUNDING
from mica.subspace.host import HostGram
from mica.subspace.result import CERTIFIED_EXCESS, is_certified
from tests.support.judging import energy, truth
from tests.support.spectra import RANK, weight
from tests.support.tolerances import error

SHAPES = [(60, 40), (40, 60), (50, 50)]


def stated(matrix: torch.Tensor, method: str = "gram") -> Problem:
    """Of one matrix on the host, of a batch as for a device."""
    basis_is_long = matrix.shape[-2] > matrix.shape[-1]
    tall = matrix if basis_is_long else matrix.mT
    gram = HostGram(tall) if matrix.ndim == 2 else BatchGram(tall)
    return problem(tall, gram, RANK, basis_is_long, 0, method)


def exact_vectors(state: Problem, extra: int = 0) -> torch.Tensor:
    """The exact short vectors, in another basis; ``extra`` places above the smallest."""
    _, _, right = torch.linalg.svd(state.tall.double(), full_matrices=False)
    last = right.shape[-2] - extra
    mixing = torch.randn(RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors = right[..., last - RANK : last, :].mT @ torch.linalg.qr(mixing).Q
    return vectors.mT.contiguous().mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["gaussian", "graded to 1.6e-6", "row scales", "times 1e-4"])
@pytest.mark.parametrize("batch", [False, True])
def test_triplets_of_a_span(name, shape, batch, monkeypatch):
    matrix = weight(name, *shape)
    matrix = torch.stack([matrix, matrix.flip(0)]) if batch else matrix
    state = stated(matrix)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    triplets = candidate(state, exact_vectors(state))
    assert error(triplets.singular_values, values[..., -RANK:]) <= 1e-9
    short = right.mT if state.basis_is_long else left
    for vectors, exact in ((triplets.basis, left[..., -RANK:]), (triplets.short_vectors, short[..., -RANK:])):
        cosines = (exact.mT @ vectors).abs()
        assert error(cosines, torch.eye(RANK, dtype=torch.float64).expand_as(cosines)) <= 1e-7
    if name == "graded to 1.6e-6":
        assert not triplets.resolved


def test_the_weight_is_passed_over_only_where_it_has_to_be(monkeypatch):
    calls = []
    image = module.image
    monkeypatch.setattr(module, "image", lambda *arguments: calls.append(1) or image(*arguments))
    for shape, name, passes in (
        ((40, 60), "gaussian", 0),
        ((50, 50), "hard edge", 0),
        ((40, 60), "graded to 1.6e-6", 1),
        ((60, 40), "gaussian", 1),
    ):
        calls.clear()
        state = stated(weight(name, *shape))
        triplets = candidate(state, exact_vectors(state))
        assert len(calls) == passes
        assert triplets.resolved == (name != "graded to 1.6e-6")
    fine = stated(weight("gaussian", 40, 60).double())  # fp64 results want what the Gram has lost
    assert not candidate(fine, exact_vectors(fine)).resolved


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", ["rank 5", "rank deficient by 3", "zero", "graded to 1e-7"])
def test_null_vectors_of_a_tall_weight_are_not_in_the_gram(name, batch):
    for shape, expected in (((60, 40), True), ((40, 60), False), ((50, 50), False)):
        matrix = weight(name, *shape)
        matrix = torch.stack([weight("gaussian", *shape), matrix]) if batch else matrix
        state = stated(matrix)
        assert (candidate(state, exact_vectors(state)) is None) == expected


def test_an_error_of_the_gram_makes_small_values_null_and_unresolved():
    for shape, matters in (((60, 40), True), ((40, 60), False)):
        state = stated(weight("gaussian", *shape))
        least = truth(weight("gaussian", *shape)).squares[-1]
        state.gram.error = 0.9 * least
        assert candidate(state, exact_vectors(state)) is not None
        assert not candidate(state, exact_vectors(state)).resolved
        state.gram.error = 1.1 * least
        assert (candidate(state, exact_vectors(state)) is None) == matters


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["gaussian", "hard edge", "graded to 1.6e-6"])
@pytest.mark.parametrize("strict", [True, False])
def test_the_judgement_on_right_and_wrong_vectors(shape, name, batch, strict):
    matrix = weight(name, *shape)
    matrix = torch.stack([matrix, 2 * matrix]) if batch else matrix
    state = stated(matrix)
    for extra in (0, 1):
        judgement = judged(state, candidate(state, exact_vectors(state, extra)), strict)
        assert judgement.basis.dtype == torch.float32
        assert judgement.certified.tolist() == ([strict and not extra] * 2 if batch else strict and not extra)
        singles = zip(judgement.basis, matrix, strict=True) if batch else [(judgement.basis, matrix)]
        for position, (basis, single) in enumerate(singles):
            squares = truth(single).squares
            least = squares[-RANK:].sum()
            floor = RANK * 4 * len(squares) ** 0.5 * torch.finfo(torch.float64).eps * squares[0]
            excess = (energy(single, basis).sum() - least) / max(least, floor)
            reported = judgement.energy_excess.reshape(-1)[position]
            if extra == 0:
                assert excess - 1e-9 <= reported <= 1 + 1e-5
            elif strict:  # nothing is proven of it
                assert reported == math.inf or reported >= excess


def test_what_the_gram_does_not_see_counts_as_energy():
    state = stated(weight("gaussian", 40, 60))
    triplets = candidate(state, exact_vectors(state))
    assert triplets.resolved
    plain = judged(state, triplets, True)
    least = truth(weight("gaussian", 40, 60)).squares[-RANK:].sum()
    state.gram.error = 1e-8 * least
    with_error = judged(state, triplets, True)
    # once for the energy of the basis, once for the deficit
    assert with_error.energy_excess - plain.energy_excess == pytest.approx(2 * RANK * 1e-8, rel=1e-3)
    state.gram.error = 1e-5 * least
    assert not judged(state, triplets, True).certified


def test_the_energy_from_the_gram_is_an_upper_bound():
    """By the share of the resolution that the certificate allows for rounding."""
    state = stated(weight("gaussian", 40, 60))
    triplets = candidate(state, exact_vectors(state))
    basis = triplets.basis.float()
    exact = energy(weight("gaussian", 40, 60), basis).sum()
    allowance = RANK * ROUNDING * state.resolution
    energy_by_gram = module.energy_of(state, triplets, basis, torch.ones(1, RANK))
    assert energy_by_gram - exact == pytest.approx(allowance.item(), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", ["graded to 1e-7", "graded to 1.6e-6", "tail x 1e-6", "rank 5", "hard edge"])
@pytest.mark.parametrize("shape", [(50, 50), (40, 60)], ids=str)
def test_the_energy_where_the_gram_does_not_resolve_it(name, shape, batch, dtype):
    """To the digits of a product with the weight itself, from the Gram of what rounding has changed alone."""
    matrix = weight(name, *shape)
    state = stated(torch.stack([matrix, 2 * matrix]) if batch else matrix)
    triplets = candidate(state, exact_vectors(state))._replace(resolved=False)
    basis = triplets.basis.to(dtype)
    signs = module.signs_of(basis)
    values = module.energy_of(state, triplets, basis * signs, signs).reshape(-1)
    floor = RANK * state.resolution.reshape(-1)
    for position, value in enumerate(values):
        single = (basis * signs)[position] if batch else basis
        exact = energy((1 + position) * matrix, single).sum()
        assert -1e-12 * exact <= value - exact <= 1e-9 * exact + 1e-2 * floor[position]


def test_rounding_to_the_dtype_is_judged_too():
    state = stated(weight("graded to 1.6e-6", 50, 50))
    triplets = candidate(state, exact_vectors(state))
    state.dtype = torch.bfloat16
    judgement = judged(state, triplets, True)
    assert judgement.energy_excess > CERTIFIED_EXCESS
    assert not judgement.certified


@pytest.mark.parametrize("batch", [False, True])
def test_signs(batch):
    columns = torch.tensor([[0.1, -0.5, 0.5, -2.0], [-0.9, 0.4, -0.5, 1.0], [0.3, 0.2, 0.1, -2.0]])
    expected = columns * torch.tensor([-1.0, -1.0, 1.0, -1.0])
    if batch:
        columns, expected = torch.stack([columns, -columns]), torch.stack([expected, expected])
    for given in (columns, -columns, columns.mT.contiguous().mT):
        assert torch.equal(given * module.signs_of(given), expected)


def test_only_krylov_pays_for_shifts(monkeypatch):
    seeds = []
    bounds = module.bounds
    monkeypatch.setattr(module, "bounds", lambda gram, seed: seeds.append(seed) or bounds(gram, seed))
    norms = [
        stated(weight("gaussian", 40, 60), method).limits.norm.item() for method in ("krylov", "gram", "svd")
    ]
    assert seeds == [0]
    assert norms[1] == norms[2] == pytest.approx(norms[0], rel=1e-2)


def test_what_counts_as_certified():
    assert is_certified(1e-5 * 3.0, 3.0, 8, 0.0)
    assert not is_certified(1.001e-5 * 3.0, 3.0, 8, 0.0)
    assert is_certified(8e-3, 0.0, 8, 1e-3)
    assert not is_certified(8.01e-3, 0.0, 8, 1e-3)
    excess, energies = torch.tensor([2e-5, 2e-5]), torch.tensor([1.0, 3.0])
    assert is_certified(excess, energies, 1, torch.tensor([0.0, 0.0])).tolist() == [False, True]
    assert Candidate(excess, excess, excess).null_count == 0
