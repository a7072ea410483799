"""Shared among processes of gloo: the same bits everywhere; test_distributed_threads.py has the rest."""

from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

from mica.subspace import many
from mica.subspace.cache import SubspaceCache
from mica.subspace.distributed import Meeting, run_shared
from mica.subspace.many import Task
from tests.support import gloo
from tests.support.models import Net, bases, wrap

pytestmark = pytest.mark.slow

SHAPES = [(40, 30), (30, 40), (64, 64), (200, 20), (25, 60)]


def make_tasks():
    generator = torch.Generator().manual_seed(0)
    return [Task(f"layer {i}", torch.randn(shape, generator=generator), 4) for i, shape in enumerate(SHAPES)]


class Solved(NamedTuple):
    bases: dict[object, torch.Tensor]
    own: list[tuple[int, int]]  # shapes that this process solved itself


def watch(function, *arguments):
    with patch.object(many, "solve_stack", wraps=many.solve_stack) as solver:
        found = function(*arguments)
    own = [tuple(call.args[0].shape[-2:]) for call in solver.call_args_list]
    return Solved(found, own)


def solve(folder):
    meeting = Meeting("layers")
    subspaces = run_shared(make_tasks(), meeting, cache=SubspaceCache(folder))
    return {index: result.basis for index, result in subspaces}


def create():
    """`get_peft_model`."""
    torch.manual_seed(0)
    return bases(wrap(Net()))


def _play(rank, folder):
    played = {}
    for case in ("cached", "cached again"):
        played[case] = gloo.attempt(watch, solve, folder)
    played["created"] = gloo.attempt(watch, create)
    return played


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """case -> of each process what it has ``Solved``, or its exception."""
    processes = gloo.run(_play, str(tmp_path_factory.mktemp("cache")))
    return {case: [process[case] for process in processes] for case in processes[0]}


@pytest.mark.parametrize("case", ["cached", "cached again"])
def test_all_hold_the_bits_of_one_process_and_solve_a_share_each(played, case):
    expected = {index: result.basis for index, result in many.run_tasks(make_tasks(), range(len(SHAPES)))}
    for solved in played[case]:
        assert solved.bases.keys() == expected.keys()
        assert all(torch.equal(solved.bases[index], expected[index]) for index in expected)
    own = [shape for solved in played[case] for shape in solved.own]
    assert sorted(own) == ([] if case == "cached again" else sorted(SHAPES))


def test_get_peft_model(played):
    expected = watch(create)
    for solved in played["created"]:
        assert solved.bases.keys() == expected.bases.keys()
        assert all(torch.equal(solved.bases[name], expected.bases[name]) for name in expected.bases)
    assert sum(len(solved.own) for solved in played["created"]) == len(expected.own)
