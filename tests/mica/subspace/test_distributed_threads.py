"""What is shared among processes, with threads in their place; test_distributed.py has processes."""

from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mica.subspace import distributed, many
from mica.subspace.distributed import all_request, solve_shared
from mica.subspace.many import Task
from tests.support.threads import Group

SHAPES = [(12, 8), (8, 12), (20, 20)]  # the last, the largest, is process 0's


def make_tasks(count=3):
    generator = torch.Generator().manual_seed(0)
    return [Task(f"layer {i}", torch.randn(SHAPES[i], generator=generator), 2) for i in range(count)]


@pytest.fixture
def group(monkeypatch):
    group, store = Group(), dist.HashStore()

    def gather(gathered, value):
        gathered[:] = group.gathered(value)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: group.count)
    monkeypatch.setattr(dist, "get_rank", lambda: group.rank)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    world = SimpleNamespace(get_group_store=lambda: store)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=world))
    return group


@pytest.fixture
def solved(group, monkeypatch):
    """Of each process, the layers that it has solved itself."""
    solved = [[], []]

    def solve_many(tasks, **options):
        solved[group.rank] += [task.name for task in tasks]
        return many.solve_many(tasks, **options)

    monkeypatch.setattr(distributed, "solve_many", solve_many)
    return solved


def bases(tasks):
    share = all_request([task.name for task in tasks])
    return {index: result.basis.tolist() for index, result in solve_shared(tasks, share=share)}


def alone(tasks):
    return {index: result.basis.tolist() for index, result in many.solve_many(tasks)}


def test_each_solves_a_share_and_has_all(group, solved, monkeypatch):
    """Without a cache no weight is hashed for one, which takes ten times as long."""
    monkeypatch.setattr(many, "content_hash", None)
    tasks = make_tasks()
    assert group.run(lambda: bases(tasks)) == [alone(tasks)] * 2
    assert solved == [["layer 2", "layer 1"], ["layer 0"]]


@pytest.mark.parametrize("change", [lambda weight: weight + 1, lambda weight: weight.T.contiguous().T])
def test_other_content_or_order_in_memory_under_one_name_is_not_shared(group, solved, change):
    tasks = [make_tasks(), make_tasks()]
    tasks[1][2] = replace(tasks[1][2], weight=change(tasks[1][2].weight))
    assert group.run(lambda: bases(tasks[group.rank])) == [alone(of_one) for of_one in tasks]
    assert [own.count("layer 2") for own in solved] == [1, 1]
    assert sorted(name for own in solved for name in own if name != "layer 2") == ["layer 0", "layer 1"]


def test_an_error_in_one_is_the_same_error_in_all(group):
    tasks = make_tasks()
    tasks[2].weight[0, 0] = torch.nan
    first, second = group.run(lambda: bases(tasks))
    assert type(first) is type(second) is ValueError
    assert str(first).startswith("layer 2: weight must be finite")
    assert str(second) == f"{first} (in process 0)"


def test_any_other_error_is_one_in_all(group, monkeypatch):
    def solve_many(tasks, **options):
        if group.rank == 1:
            raise MemoryError("too large")
        return many.solve_many(tasks, **options)

    monkeypatch.setattr(distributed, "solve_many", solve_many)
    found = [repr(error) for error in group.run(lambda: bases(make_tasks()))]
    assert found == ["RuntimeError('too large (in process 1)')", "MemoryError('too large')"]


def test_what_the_solver_refuses_is_its_error_in_every_process(group):
    tasks = make_tasks()
    tasks[2] = replace(tasks[2], weight=tasks[2].weight.int())
    for error in group.run(lambda: bases(tasks)):
        assert isinstance(error, TypeError)
        assert "weight must be of dtype" in str(error)


def test_one_without_weights_takes_no_part_but_is_waited_for(group, solved):
    tasks = [make_tasks(), make_tasks()]
    tasks[1][:2] = [replace(task, weight=task.weight.to("meta")) for task in tasks[1][:2]]
    first, second = group.run(lambda: bases(tasks[group.rank]))
    assert first == alone(make_tasks())
    assert second == {2: first[2]}
    assert solved == [["layer 2", "layer 0", "layer 1"], []]


def test_those_that_request_other_layers_work_alone(group, solved):
    first, second = group.run(lambda: bases(make_tasks(2 + group.rank)))
    assert (first, second) == (alone(make_tasks(2)), alone(make_tasks(3)))


def test_one_that_calls_alone_is_told_to_call_in_every_process(group, monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.01))
    with pytest.raises(RuntimeError, match=r"^all 2 processes .* in every process at the same time"):
        bases(make_tasks())


def test_a_single_process_waits_for_none(group):
    group.count = 1
    assert not all_request(["layer 0"])


@pytest.mark.parametrize(
    ("weight", "current", "devices", "chosen"),
    [
        (2, 0, 8, 2),
        (-1, 0, 8, 3),  # on the CPU, and no device was set
        (-1, 5, 8, 5),
        (-1, 0, 1, 0),  # of several that are visible to others
    ],
)
def test_messages_leave_from_a_device_of_this_process(monkeypatch, weight, current, devices, chosen):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext(used.append(index)))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda gathered, value: None)
    used, task = [], SimpleNamespace(weight=SimpleNamespace(get_device=lambda: weight))
    distributed._all_gather(None, [task])
    assert [current if index < 0 else index for index in used] == [chosen]


@pytest.mark.parametrize("count", [2, 3])
def test_shares_are_nearly_equal_and_complete(group, monkeypatch, count):
    costs = [5.0, 1.0, 1.0, 9.0, 2.0, 4.0, 1.0, 3.0]
    monkeypatch.setattr(distributed, "cost", lambda task: costs[task.rank])
    group.__init__(count)
    tasks = [replace(make_tasks(1)[0], rank=position) for position in range(len(costs))]
    parts = [mine for mine, _ in group.run(lambda: distributed._divide(tasks))]
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    loads = [sum(costs[index] for index in part) for part in parts]
    assert max(loads) - min(loads) <= max(costs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
