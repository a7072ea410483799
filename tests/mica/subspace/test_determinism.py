"""The same bits in every call, process and default, the same numbers with more threads."""

import pytest
import torch

from mica.subspace import krylov
from tests.mica.subspace.subspaces import SHAPES, quietly_solved, same
from tests.support.processes import printed_by
from tests.support.spectra import RANK, weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["krylov", "gram", "svd"])
@pytest.mark.parametrize("name", ["gaussian", "rank 5"])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_call_same_bits(shape, method, name, threads):
    torch.set_num_threads(threads)
    matrix, state = weight(name, *shape), torch.get_rng_state()
    first, again = (quietly_solved(each, RANK, method=method) for each in (matrix, matrix.clone()))
    torch.set_num_threads(1)
    assert same(first, again)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("shape", "dtype"), [((200, 140), torch.float32), ((150, 150), torch.float64)])
def test_seeds_start_elsewhere_and_end_at_the_same_subspace(shape, dtype, monkeypatch):
    matrix = weight("gaussian", *shape).to(dtype)
    first = quietly_solved(matrix, RANK, method="krylov")
    monkeypatch.setattr(krylov, "SEED", 1)
    other = quietly_solved(matrix, RANK, method="krylov")
    assert (first.method, other.method) == ("krylov", "krylov")
    assert not torch.equal(first.basis, other.basis)
    torch.testing.assert_close(first.basis, other.basis, rtol=0, atol=1e-6)


# A fresh process

CASES = [((140, 200), "krylov"), ((300, 140), "krylov"), ((120, 40), "gram"), ((60, 60), "svd")]

PROGRAM = """
import sys
import torch
from mica.subspace import krylov
from tests.mica.subspace.subspaces import solved_by

krylov.FIRST_CHECK = 1
torch.set_num_threads(1)
cases = torch.load(sys.argv[1])
torch.save([solved_by(method, matrix, rank) for matrix, rank, method in cases], sys.argv[2])
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("determinism")
    torch.save([(weight("gaussian", *shape), RANK, method) for shape, method in CASES], folder / "cases")
    printed_by(PROGRAM, folder / "cases", folder / "results")
    return torch.load(folder / "results", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_one_thread_gives_the_same_bits_anywhere_and_two_the_same_numbers(elsewhere, case):
    shape, method = CASES[case]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(quietly_solved(weight("gaussian", *shape), RANK, method=method))
    torch.set_num_threads(1)
    first, with_two = results
    assert same(first, elsewhere[case])
    assert first.method == method
    torch.testing.assert_close(first.basis, with_two.basis, rtol=0, atol=1e-6)
    torch.testing.assert_close(first.singular_values, with_two.singular_values, rtol=1e-6, atol=0)


# ``torch.set_default_device`` and ``torch.set_default_dtype`` are the caller's


@pytest.fixture(params=[False, True])
def path(request):
    """On the host, and as on an accelerator."""
    if request.param:
        request.getfixturevalue("accelerated")


@pytest.fixture(params=["meta", torch.float64, torch.bfloat16], ids=str)
def foreign_default(request, path):
    """A function that runs another one under a default that is not the weights'."""

    def under(function):
        if request.param == "meta":  # whatever is made there holds no numbers: the first look at it raises
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)

    return under


WEIGHTS = {
    **{str(shape): weight("gaussian", *shape) for shape in ((140, 200), (200, 140), (60, 40), (150, 300))},
    "null directions": weight("zero rows and columns", 60, 40),
    "large numbers": weight("gaussian", 140, 200).double() * 1e50,
    "zero": torch.zeros(30, 20),
}
METHODS = ["auto", "krylov", "gram", "svd"]
DEFAULTS = [(name, method) for name in WEIGHTS for method in (METHODS if name[0] == "(" else ["auto"])]


@pytest.mark.parametrize(("name", "method"), DEFAULTS)
def test_the_same_bits_under_any_default(foreign_default, name, method):
    def solve():
        return quietly_solved(WEIGHTS[name], RANK, method=method)

    assert same(foreign_default(solve), solve())
