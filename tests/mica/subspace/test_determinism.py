"""Fresh processes: the same bits with one thread, the same numbers with two."""

import subprocess
import sys

import pytest
import torch

from tests.support.spectra import RANK, weight

CASES = [((140, 200), "krylov"), ((300, 140), "krylov"), ((120, 40), "gram"), ((60, 60), "svd")]

PROGRAM = """
import sys
import torch
from mica.subspace import krylov, minor_subspace

krylov.FIRST_CHECK = 1
torch.set_num_threads(int(sys.argv[1]))
cases = torch.load(sys.argv[2])
results = [minor_subspace(matrix, rank, method=method) for matrix, rank, method in cases]
torch.save([(r.basis, r.singular_values, r.energy_excess, r.method) for r in results], sys.argv[3])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("determinism")
    torch.save([(weight("gaussian", *shape), RANK, method) for shape, method in CASES], folder / "cases")
    results = []
    for index, threads in enumerate((1, 1, 2)):
        arguments = [str(threads), str(folder / "cases"), str(folder / str(index))]
        subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True)
        results.append(torch.load(folder / str(index)))
    return results


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_one_thread_gives_the_same_bits(runs, case):
    for first, second in zip(runs[0][case], runs[1][case], strict=True):
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    assert runs[0][case][3] == CASES[case][1]


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_two_threads_give_the_same_numbers(runs, case):
    assert (runs[0][case][0] - runs[2][case][0]).abs().max() <= 1e-6
    torch.testing.assert_close(runs[0][case][1], runs[2][case][1], rtol=1e-6, atol=0)
