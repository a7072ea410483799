"""Shared among processes of gloo: the same bits everywhere, and an error where one calls alone."""

from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from mica.subspace import distributed, many
from mica.subspace.cache import SubspaceCache
from mica.subspace.distributed import all_request, solve_shared
from mica.subspace.many import Task
from tests.support import gloo
from tests.support.models import Net, adapted_layers, bases, wrap

pytestmark = pytest.mark.slow

SHAPES = [(40, 30), (30, 40), (64, 64), (200, 20), (25, 60)]


def make_tasks(seed=0, count=5):
    generator = torch.Generator().manual_seed(seed)
    return [Task(f"layer {i}", torch.randn(SHAPES[i], generator=generator), 4) for i in range(count)]


def absent(tasks):
    return [replace(task, weight=task.weight.to("meta")) for task in tasks]


class Solved(NamedTuple):
    case: str
    share: bool
    bases: dict[int, torch.Tensor]
    own: list[tuple[int, int]]  # shapes that this process solved itself
    hashed: list[tuple[int, int]]  # and those of which it made the cache's key


def solve(case, tasks, cache=None):
    with (
        patch.object(many, "solve_each", wraps=many.solve_each) as solver,
        patch.object(many, "content_hash", wraps=many.content_hash) as hashes,
    ):
        share = all_request([(task.name, task.rank) for task in tasks])
        subspaces = list(solve_shared(tasks, share=share, cache=cache))
    assert len({index for index, _ in subspaces}) == len(subspaces)
    solved = {index: result.basis for index, result in subspaces}
    own = [tuple(call.args[0].shape) for call in solver.call_args_list]
    hashed = [tuple(call.args[0].shape) for call in hashes.call_args_list]
    return Solved(case, share, solved, own, hashed)


TASKS = {
    **dict.fromkeys(["together", "again", "cached", "cached again"], lambda rank: make_tasks()),
    "another model": lambda rank: make_tasks(1),
    "one has no weights": lambda rank: absent(make_tasks()) if rank == 1 else make_tasks(),
    "their layers differ": lambda rank: make_tasks(count=3 + rank),
}


def call_alone(rank):
    """`get_peft_model` in the first process; what it raises there, and what is left of the model."""
    if rank:
        return None
    distributed.TIMEOUT = timedelta(seconds=1)
    model = Net()
    error = gloo.attempt(wrap, model)
    return type(error), str(error), len(adapted_layers(model))


def _play(rank, folder):
    cache = SubspaceCache(folder)
    played = {}
    for case, tasks in TASKS.items():
        played[case] = gloo.attempt(solve, case, tasks(rank), cache if "cached" in case else None)
    torch.manual_seed(0)
    model = Net()
    played["get_peft_model"] = gloo.attempt(lambda: bases(wrap(model)))
    played["one calls alone"] = call_alone(rank)
    dist.barrier()
    return played


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """(count, case) -> of each process what it has ``Solved``, or its exception."""
    played, folder = {}, tmp_path_factory.mktemp("cache")
    for count in (2, 3):  # processes, which take seconds to begin
        processes = gloo.run(_play, str(folder / str(count)), count=count)
        for case in processes[0]:
            played[count, case] = [process[case] for process in processes]
    return played


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", ["together", "again", "another model", "cached", "cached again"])
def test_all_hold_the_bits_of_one_process_and_solve_a_share_each(played, case, count):
    results = played[count, case]
    expected = {index: result.basis for index, result in many.solve_many(TASKS[case](0))}
    for solved in results:
        assert solved.share
        assert solved.bases.keys() == expected.keys()
        assert all(torch.equal(solved.bases[index], expected[index]) for index in expected)
    own = sorted(shape for solved in results for shape in solved.own)
    if case == "cached again":
        assert not own
    else:
        assert own == sorted(SHAPES)
        assert all(solved.own for solved in results)


@pytest.mark.parametrize("count", [2, 3])
def test_each_process_asks_the_cache_for_its_share(played, count):
    for solved, later in zip(played[count, "cached"], played[count, "cached again"], strict=True):
        assert sorted(solved.hashed) == sorted(later.hashed) == sorted(solved.own)


@pytest.mark.parametrize("count", [2, 3])
def test_those_with_weights_solve_for_themselves_where_another_has_none(played, count):
    for rank, solved in enumerate(played[count, "one has no weights"]):
        assert solved.share
        assert sorted(solved.own) == ([] if rank == 1 else sorted(SHAPES))
        assert len(solved.bases) == len(solved.own)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_with_other_layers_work_alone(played, count):
    for rank, solved in enumerate(played[count, "their layers differ"]):
        assert not solved.share
        assert len(solved.own) == len(solved.bases) == 3 + rank


def test_get_peft_model_in_all_processes(played):
    first, second = played[2, "get_peft_model"]
    torch.manual_seed(0)
    expected = bases(wrap(Net()))
    for found in (first, second):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("count", [2, 3])
def test_get_peft_model_in_one_process_only_is_an_error_that_says_so(played, count):
    kind, message, adapted = played[count, "one calls alone"][0]
    assert kind is RuntimeError
    assert message.startswith(f"all {count} processes of torch.distributed compute MiCA's minor subspaces")
    assert "within 1 s: create the adapter in every process at the same time, not under `if rank" in message
    assert adapted == 0  # the model is as before
