"""Shared among processes: the same bits everywhere, and none waits forever."""

import time
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mica.subspace import distributed, many
from mica.subspace.cache import SubspaceCache
from mica.subspace.distributed import Sharing, solve_shared
from mica.subspace.many import Task
from tests.support import gloo

pytestmark = pytest.mark.slow

SHAPES = [(40, 30), (30, 40), (64, 64), (200, 20), (25, 60)]
IMPATIENCE = 0.5


def make_tasks(seed=0, count=5):
    generator = torch.Generator().manual_seed(seed)
    return [Task(f"layer {i}", torch.randn(SHAPES[i], generator=generator), 4) for i in range(count)]


class Solved(NamedTuple):
    step: str
    bases: dict[int, torch.Tensor]
    own: list[tuple[int, int]]  # shapes that this process solved itself
    hashed: list[tuple[int, int]]  # and those of which it made the cache's key
    seconds: float
    patience: float


def solve(step, folder):
    tasks, cache = TASKS[step](), SubspaceCache(folder) if "cached" in step else None
    start = time.perf_counter()
    with (
        patch.object(many, "solve_each", wraps=many.solve_each) as solver,
        patch.object(many, "fingerprint", wraps=many.fingerprint) as hashes,
    ):
        subspaces = list(solve_shared(tasks, Sharing(), cache=cache))
    seconds = time.perf_counter() - start
    assert len({index for index, _ in subspaces}) == len(subspaces) == len(tasks)
    bases = {index: result.basis for index, result in subspaces}
    own = [tuple(call.args[0].shape) for call in solver.call_args_list]
    hashed = [tuple(call.args[0].shape) for call in hashes.call_args_list]
    return Solved(step, bases, own, hashed, seconds, distributed.PATIENCE.total_seconds())


def wait_for(seconds):
    distributed.PATIENCE = timedelta(seconds=seconds)


TASKS = {
    **dict.fromkeys(["together", "alone", "cached", "cached again"], make_tasks),
    "of another model together": lambda: make_tasks(1),
    "three alone": lambda: make_tasks(count=3),
    "four alone": lambda: make_tasks(count=4),
}
STEPS = {
    "impatient": lambda: wait_for(IMPATIENCE),
    "patient": lambda: wait_for(60),
    "barrier": lambda: dist.barrier(),
    "late": lambda: time.sleep(1.5),
    "decline": lambda: distributed.decline([replace(t, weight=t.weight.to("meta")) for t in make_tasks()]),
    "without a store": lambda: setattr(distributed_c10d, "_get_default_store", None),
}
SCRIPTS = {
    "all call": ["together, together, of another model together"] * 2,
    "one calls alone": ["together, impatient, alone", "together"],
    # First it declines, then it has them and takes its share
    "one has no weights": ["alone, together", "decline, together"],
    "some have called alone": [
        "impatient, alone, alone, barrier, patient, together",
        "impatient, barrier, patient, together",
        "impatient, alone, barrier, patient, together",
    ],
    "one comes too late": [
        "impatient, alone, barrier, patient, together",
        "late, impatient, alone, barrier, patient, together",
    ],
    # The declined meeting is not the one that was missed
    "one declines after another called alone": [
        "impatient, alone, barrier, patient, barrier, alone, together",
        "barrier, decline, barrier, together",
    ],
    "their layers differ": ["impatient, three alone", "impatient, four alone"],
    "there is no store to agree at": ["without a store, alone"] * 2,
}
PLAYED = SCRIPTS | {
    "a cache": ["cached, cached again"] * 2,
}


def _steps(script, folder):
    steps = [solve(step, folder) if step in TASKS else STEPS[step]() for step in script.split(", ")]
    return [*filter(None, steps)]


def _play(rank, scripts, folder):
    """Each script as if the processes had just met: its meetings are its own."""
    played, find_store = {}, distributed_c10d._get_default_store
    for case, script in scripts.items():
        wait_for(60)
        distributed_c10d._get_default_store = lambda case=case: dist.PrefixStore(case, find_store())
        played[case] = gloo.attempt(_steps, script[rank], folder)
        dist.barrier()
    return played


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """By case, of each process what its steps have ``Solved``, or its exception."""
    played, folder = {}, str(tmp_path_factory.mktemp("cache"))
    for count in (2, 3):  # processes, which take seconds to begin
        scripts = {case: script for case, script in PLAYED.items() if len(script) == count}
        processes = gloo.run(_play, scripts, folder, count=count)
        played |= {case: [process[case] for process in processes] for case in scripts}
    return played


def assert_solved(solved):
    expected = {index: result.basis for index, result in many.solve_many(TASKS[solved.step]())}
    assert solved.bases.keys() == expected.keys()
    assert all(torch.equal(solved.bases[index], expected[index]) for index in expected)


def assert_shared(results):
    for solved in results:
        assert_solved(solved)
        assert solved.own
    assert sorted(shape for solved in results for shape in solved.own) == sorted(SHAPES)


@pytest.mark.parametrize("case", SCRIPTS)
def test_who_shares_and_who_goes_alone(played, case):
    """Those together hold the same bits and solve a share each; no one waits longer than its patience."""
    for solved in chain.from_iterable(played[case]):
        if "alone" in solved.step:
            assert_solved(solved)
            assert len(solved.own) == len(solved.bases)
            assert (IMPATIENCE if solved.patience == IMPATIENCE else 0) <= solved.seconds < 20
        else:
            assert solved.seconds < 30
    joint = ([solved for solved in process if "together" in solved.step] for process in played[case])
    for results in zip(*joint, strict=True):
        assert_shared(results)


def test_each_process_asks_the_cache_for_its_share(played):
    first, again = zip(*played["a cache"], strict=True)
    assert_shared(first)
    assert not any(solved.own for solved in again)
    for solved, later in zip(first, again, strict=True):
        assert sorted(solved.hashed) == sorted(later.hashed) == sorted(solved.own)
