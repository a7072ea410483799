"""Shared among processes: the same bits everywhere, each its own weights, and none waits forever."""

import time
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from mica.subspace import distributed, many
from mica.subspace.cache import SubspaceCache
from mica.subspace.distributed import shares, solve_shared
from mica.subspace.many import Task
from tests.support import gloo

SHAPES = [(40, 30), (30, 40), (64, 64), (200, 20), (25, 60)]
IMPATIENCE = 0.5


def make_tasks(seed=0, count=5, value=None):
    """``value``: of one entry of the largest layer, which process 0 gets."""
    generator = torch.Generator().manual_seed(seed)
    tasks = [Task(f"layer {i}", torch.randn(SHAPES[i], generator=generator), 4) for i in range(count)]
    if value is not None:
        tasks[2].weight[0, 0] = value
    return tasks


class Solved(NamedTuple):
    step: str
    bases: dict[int, torch.Tensor]
    own: list[tuple[int, int]]  # shapes that this process solved itself
    seconds: float
    patience: float


def solve(step, folder):
    tasks, cache = TASKS[step](), SubspaceCache(folder) if "cached" in step else None
    own, solver, start = [], many.solve_each, time.perf_counter()

    def counting(weight, rank, **kwargs):
        own.append(tuple(weight.shape))
        return solver(weight, rank, **kwargs)

    many.solve_each = counting
    try:
        subspaces = list(solve_shared(tasks, cache=cache))
    finally:
        many.solve_each = solver
    assert len({index for index, _ in subspaces}) == len(subspaces) == len(tasks)
    bases = {index: result.basis for index, result in subspaces}
    return Solved(step, bases, own, time.perf_counter() - start, distributed.PATIENCE.total_seconds())


TASKS = {
    **dict.fromkeys(["together", "alone", "cached", "cached again"], make_tasks),
    "of another model together": lambda: make_tasks(1),
    "three alone": lambda: make_tasks(count=3),
    "four alone": lambda: make_tasks(count=4),
    "with another layer": lambda: make_tasks(value=2.0),
    "broken": lambda: make_tasks(value=torch.nan),
}
STEPS = {
    "impatient": lambda: setattr(distributed, "PATIENCE", timedelta(seconds=IMPATIENCE)),
    "patient": lambda: setattr(distributed, "PATIENCE", timedelta(seconds=60)),
    "barrier": lambda: dist.barrier(),
    "late": lambda: time.sleep(1.5),
    "decline": lambda: distributed.decline(
        [replace(task, weight=task.weight.to("meta")) for task in make_tasks()]
    ),
    "without a store": lambda: setattr(dist.distributed_c10d, "_get_default_store", None),
}


def _play(rank, scripts, folder):
    steps = scripts[rank].split(", ")
    return [solve(step, folder) if step in TASKS else STEPS[step]() for step in steps]


def run(*scripts, folder=""):
    """By process, what its steps have ``Solved``."""
    processes = gloo.run(_play, scripts, str(folder), count=len(scripts))
    return [process if isinstance(process, Exception) else [*filter(None, process)] for process in processes]


def assert_solved(solved):
    expected = {index: result.basis for index, result in many.solve_many(TASKS[solved.step]())}
    assert solved.bases.keys() == expected.keys()
    assert all(torch.equal(solved.bases[index], expected[index]) for index in expected)


def assert_shared(results):
    for solved in results:
        assert_solved(solved)
        assert solved.own
    assert sorted(shape for solved in results for shape in solved.own) == sorted(SHAPES)


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


@pytest.mark.parametrize("case", SCRIPTS)
def test_who_shares_and_who_goes_alone(case):
    """Those together hold the same bits and solve a share each; no one waits longer than its patience."""
    processes = run(*SCRIPTS[case])
    for solved in chain.from_iterable(processes):
        if "alone" in solved.step:
            assert_solved(solved)
            assert len(solved.own) == len(solved.bases)
            assert (IMPATIENCE if solved.patience == IMPATIENCE else 0) <= solved.seconds < 20
        else:
            assert solved.seconds < 30
    joint = ([solved for solved in process if "together" in solved.step] for process in processes)
    for results in zip(*joint, strict=True):
        assert_shared(results)


def test_weights_of_one_name_and_different_content_are_not_shared():
    (mine,), (theirs,) = run("together", "with another layer")
    for solved in (mine, theirs):
        assert_solved(solved)
        assert SHAPES[2] in solved.own
    assert len(mine.own + theirs.own) == len(SHAPES) + 1


def test_an_error_in_one_is_an_error_in_all():
    first, second = run("broken", "broken")
    assert isinstance(first, ValueError)
    assert isinstance(second, ValueError)
    assert str(first).startswith("layer 2: weight must be finite")
    assert str(second) == f"{first} (in process 0)"


def test_each_process_asks_the_cache_for_its_share(tmp_path):
    first, again = zip(*run(*["cached, cached again"] * 2, folder=tmp_path), strict=True)
    assert_shared(first)
    assert not any(solved.own for solved in again)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_nearly_equal_and_complete(count):
    costs = [5.0, 1.0, 1.0, 9.0, 2.0, 4.0, 1.0, 3.0]
    parts = shares(costs, count)
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    loads = [sum(costs[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= 2
    assert shares([], count) == [[]] * count
