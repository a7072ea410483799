"""Which method is tried, after which, and what each of them finds."""

import pytest
import torch

from mica.subspace import krylov, methods
from mica.subspace.candidate import problem
from mica.subspace.host import HostGram
from tests.support.judging import sine, truth
from tests.support.spectra import RANK, weight
from tests.support.tolerances import error


def stated(matrix: torch.Tensor, rank: int = RANK, method: str = "krylov"):
    basis_is_long = matrix.shape[0] > matrix.shape[1]
    tall = matrix if basis_is_long else matrix.T
    return problem(tall, HostGram(tall), rank, basis_is_long, 0, method)


@pytest.mark.parametrize(
    ("size", "rank", "expected"),
    [
        (4096, 16, "krylov"), (4096, 128, "krylov"), (4096, 1024, "gram"), (4096, 3072, "gram"),
        (4096, 3073, "svd"), (4096, 256, "krylov"), (2048, 128, "gram"), (1024, 64, "gram"),
        (1001, 16, "krylov"), (1000, 16, "gram"), (1024, 768, "gram"),
        (1024, 769, "svd"), (40, 30, "gram"), (40, 31, "svd"), (1, 1, "svd"), (2, 1, "gram"),
    ],
)  # fmt: skip
def test_the_way_that_auto_takes(size, rank, expected, monkeypatch):
    monkeypatch.setattr(krylov, "FIRST_CHECK", 7)
    assert methods.route(size, rank) == expected
    whole = ["krylov", "gram", "svd"]
    assert methods.chain("auto", size, rank) == whole[whole.index(expected) :]


def test_what_each_method_falls_back_to():
    assert methods.METHODS == ("auto", "krylov", "gram", "svd")
    assert methods.chain("krylov", 40, 8) == ["krylov", "gram", "svd"]
    assert methods.chain("gram", 4096, 8) == ["gram", "svd"]
    assert methods.chain("svd", 4096, 8) == ["svd"]


@pytest.mark.parametrize("shape", [(200, 140), (140, 200), (150, 150)], ids=str)
@pytest.mark.parametrize("method", methods.BY)
def test_each_finds_the_triplets(shape, method):
    matrix = weight("gaussian", *shape)
    triplets = methods.BY[method](stated(matrix))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    short = right[-RANK:].T if shape[0] > shape[1] else left[:, -RANK:]
    assert sine(left[:, -RANK:], triplets.basis) <= 1e-4
    assert sine(short, triplets.short_vectors) <= 1e-4
    assert error(triplets.singular_values, values[-RANK:]) <= 1e-7
    assert triplets.null_count == 0


def test_krylov_needs_room_and_convergence(monkeypatch):
    matrix = weight("gaussian", 200, 140)
    assert methods.by_krylov(stated(matrix)) is not None
    assert methods.by_krylov(stated(matrix, 12)) is None  # 2 * 20 * 4 > 140
    ritz = krylov.smallest_eigenvectors(
        stated(matrix).gram, RANK, stated(matrix).limits, torch.finfo(torch.float32).eps, 0
    )
    for outcome in (None, ritz._replace(converged=False)):
        monkeypatch.setattr(krylov, "smallest_eigenvectors", lambda *arguments, outcome=outcome: outcome)
        assert methods.by_krylov(stated(matrix)) is None


def test_krylov_is_as_precise_as_the_dtype_of_the_result(monkeypatch):
    calls = []
    monkeypatch.setattr(krylov, "smallest_eigenvectors", lambda *arguments: calls.append(arguments[1:]))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        state = stated(weight("gaussian", 200, 140).to(dtype))
        assert methods.by_krylov(state) is None
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert calls.pop() == (RANK, state.limits, eps, 0)


@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (40, 40)], ids=str)
@pytest.mark.parametrize("lost", [0, 3, 20])
def test_the_svd_counts_the_null_values_of_a_tall_weight(shape, lost):
    left, values, right = torch.linalg.svd(weight("gaussian", *shape).double(), full_matrices=False)
    values[len(values) - lost :] = 0
    triplets = methods.by_svd(stated(left * values @ right, method="svd"))
    assert triplets.null_count == (min(lost, RANK) if shape[0] > shape[1] else 0)
    unit = torch.eye(RANK, dtype=torch.float64)
    assert error(triplets.basis.T @ triplets.basis, unit) <= 1e-13
    assert error(triplets.short_vectors.T @ triplets.short_vectors, unit) <= 1e-13
    if not lost:
        assert sine(truth(left * values @ right).vectors[:, -RANK:], triplets.basis) <= 1e-12
