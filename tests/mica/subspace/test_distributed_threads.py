"""What is shared among processes, with threads in their place; processes are in test_setups.py."""

import logging
import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mica.subspace import distributed, many
from mica.subspace.cache import SubspaceCache
from mica.subspace.distributed import Meeting, run_shared
from mica.subspace.many import Task
from tests.support.threads import Group

SHAPES = [(12, 8), (8, 12), (20, 20)]  # the last, the largest, is process 0's


def make_tasks(count=3):
    generator = torch.Generator().manual_seed(0)
    return [Task(f"layer {i}", torch.randn(SHAPES[i], generator=generator), 2) for i in range(count)]


def hash_stores(count):
    return [dist.HashStore()] * count


def tcp_stores(count):
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [first] + [dist.TCPStore("127.0.0.1", first.port) for _ in range(1, count)]


@pytest.fixture
def group(monkeypatch):
    """Two processes; ``stores`` of a group has the store of each."""
    group = Group()
    group.stores = hash_stores(3)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: group.count)
    monkeypatch.setattr(dist, "get_rank", lambda: group.rank)
    world = SimpleNamespace(get_group_store=lambda: group.stores[group.rank])
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=world))
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(minutes=5))
    return group


@pytest.fixture
def solved(group, monkeypatch):
    """Of each process, the layers that it has solved itself."""
    solved = [[], [], []]

    def run_tasks(tasks, indices, **options):
        solved[group.rank] += [tasks[index].name for index in indices]
        return many.run_tasks(tasks, indices, **options)

    monkeypatch.setattr(distributed, "run_tasks", run_tasks)
    return solved


def bases(tasks, **options):
    meeting = Meeting([task.name for task in tasks])
    found = [(index, result.basis.tolist()) for index, result in run_shared(tasks, meeting, **options)]
    assert len(found) == len(dict(found))
    return dict(found)


def alone(tasks):
    return {index: result.basis.tolist() for index, result in many.run_tasks(tasks, range(len(tasks)))}


def assert_both_have_all(group):
    assert group.run(lambda: bases(make_tasks())) == [alone(make_tasks())] * 2


@pytest.mark.parametrize("stores", [hash_stores, tcp_stores])
def test_each_solves_a_share_and_has_all(group, solved, monkeypatch, stores):
    """In messages of one piece and of many, which do not stay in the store."""
    kept = set()
    for piece in (2**22, 100):
        monkeypatch.setattr(distributed, "_PIECE", piece)
        group.stores = stores(2)
        assert_both_have_all(group)
        kept.add(group.stores[0].num_keys())
    assert solved[:2] == [["layer 2", "layer 1"] * 2, ["layer 0"] * 2]
    assert len(kept) == 1


def test_each_chunk_of_a_model_is_shared_also_with_one_that_reads_late(group, solved, monkeypatch):
    chunks = [make_tasks(), [replace(task, weight=task.weight + 1) for task in make_tasks()]]
    receive = Meeting._receive

    def late(meeting, *arguments):
        time.sleep(0.2 * group.rank)
        return receive(meeting, *arguments)

    monkeypatch.setattr(Meeting, "_receive", late)

    def share():
        meeting = Meeting("layers")
        return [
            {index: result.basis.tolist() for index, result in run_shared(tasks, meeting)} for tasks in chunks
        ]

    assert group.run(share) == [[alone(tasks) for tasks in chunks]] * 2
    assert [len(own) for own in solved] == [4, 2, 0]


def test_what_one_has_cached_nobody_solves_again(group, calls_of, tmp_path):
    expected, calls = alone(make_tasks()), calls_of(many, "solve_stack")
    for _ in range(2):
        assert group.run(lambda: bases(make_tasks(), cache=SubspaceCache(tmp_path))) == [expected] * 2
    assert len(calls) == len(SHAPES)


@pytest.mark.parametrize("change", [lambda weight: weight + 1, lambda weight: weight.T.contiguous().T])
def test_other_content_or_order_in_memory_under_one_name_is_not_shared(group, solved, change):
    tasks = [make_tasks(), make_tasks()]
    tasks[1][2] = replace(tasks[1][2], weight=change(tasks[1][2].weight))
    assert group.run(lambda: bases(tasks[group.rank])) == [alone(of_one) for of_one in tasks]
    assert [own.count("layer 2") for own in solved] == [1, 1, 0]
    assert sorted(name for own in solved for name in own if name != "layer 2") == ["layer 0", "layer 1"]


def test_an_error_in_one_is_one_in_all(group, monkeypatch):
    def run_tasks(tasks, indices, **options):
        if group.rank == 1:
            raise MemoryError("too large")
        return many.run_tasks(tasks, indices, **options)

    monkeypatch.setattr(distributed, "run_tasks", run_tasks)
    found = [repr(error) for error in group.run(lambda: bases(make_tasks()))]
    assert found == ["RuntimeError('too large (in process 1)')", "MemoryError('too large')"]


def test_one_without_weights_takes_no_part_but_is_waited_for(group, solved):
    tasks = [make_tasks(), make_tasks()]
    tasks[1][:2] = [replace(task, weight=task.weight.to("meta")) for task in tasks[1][:2]]
    first, second = group.run(lambda: bases(tasks[group.rank]))
    assert first == alone(make_tasks())
    assert second == {2: first[2]}
    assert [sorted(own) for own in solved[:2]] == [["layer 0", "layer 1", "layer 2"], []]


def test_shares_are_nearly_equal_and_complete(monkeypatch):
    costs = [5.0, 1.0, 1.0, 9.0, 2.0, 4.0, 1.0, 3.0]
    monkeypatch.setattr(distributed, "cost", lambda task: costs[task.rank])
    tasks = [replace(make_tasks(1)[0], rank=position) for position in range(len(costs))]
    for count in (2, 3):
        shares = [distributed.share_of(tasks, rank, count) for rank in range(count)]
        assert sorted(index for share in shares for index in share) == list(range(len(costs)))
        loads = [sum(costs[index] for index in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Processes that do not come


def test_a_single_process_waits_for_none(group, caplog):
    group.count = 1
    assert Meeting(["layer 0"]).is_over
    assert not caplog.messages


def test_those_that_request_other_layers_work_alone_at_once(group, caplog):
    first, second = group.run(lambda: bases(make_tasks(2 + group.rank)))
    assert (first, second) == (alone(make_tasks(2)), alone(make_tasks(3)))
    assert sorted(message[:9] for message in caplog.messages) == ["Process 0", "Process 1"]


# Who calls at the same time, one after the other
@pytest.mark.parametrize("calls", ["0 012", "0 1 2 012 012", "1 1 02 012 2 12 012", "012 01 0 012"])
def test_after_calls_of_some_processes_all_share_again(group, solved, monkeypatch, caplog, calls):
    group.__init__(3)
    expected = alone(make_tasks())
    for call in calls.split():
        minutes = 5 if call == "012" else 0
        monkeypatch.setattr(distributed, "TIMEOUT", timedelta(minutes=minutes))
        for own in solved:
            own.clear()
        caplog.clear()
        results = group.run(lambda: bases(make_tasks()) if str(group.rank) in call else None)  # noqa: B023
        assert results == [expected if str(rank) in call else None for rank in range(3)]
        if call == "012":
            assert [len(own) for own in solved] == [1, 1, 1]
            assert not caplog.messages
        else:
            assert sum(map(len, solved)) == 3 * len(call)
            assert len(caplog.messages) == len(call)
            assert all("within 0 s" in message for message in caplog.messages)


def test_one_that_is_interrupted_while_it_waits_is_not_waited_for(group, solved, monkeypatch):
    def interrupt(seconds):
        raise SystemExit

    with monkeypatch.context() as patches:
        patches.setattr(time, "sleep", interrupt)
        assert isinstance(group.run(lambda: bases(make_tasks()) if group.rank == 0 else None)[0], SystemExit)
    assert_both_have_all(group)
    assert [len(own) for own in solved] == [2, 1, 0]


@pytest.mark.parametrize("step", ["share_of", "run_tasks"])
def test_one_that_dies_is_waited_for_only_so_long(group, monkeypatch, caplog, step):
    monkeypatch.setattr(Meeting, "_agree", lambda *_: True)
    monkeypatch.setattr(Meeting, "_key", "mica/0", raising=False)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.2))
    original = getattr(distributed, step)

    def die(*arguments, **options):
        if group.rank == 1:
            raise SystemExit
        return original(*arguments, **options)

    monkeypatch.setattr(distributed, step, die)
    group.__init__(3)

    def twice():
        """The chunks of a model: after the first nobody waits again."""
        meeting = Meeting("layers")
        chunks = [dict(run_shared(make_tasks(), meeting)) for _ in range(2)]
        assert meeting.is_over
        return [{index: result.basis.tolist() for index, result in chunk.items()} for chunk in chunks]

    first, second, third = group.run(twice)
    assert first == third == [alone(make_tasks())] * 2
    assert isinstance(second, SystemExit)
    assert len(caplog.messages) == 2
    assert all("alone: nothing came from process 1" in message for message in caplog.messages)


class BreakingStore:
    """A store whose calls fail after so many, as those of a TCP store whose process has died."""

    def __init__(self, store, calls):
        self.store, self.calls = store, calls

    def __getattr__(self, name):
        def call(*arguments):
            self.calls -= 1
            if self.calls < 0:
                raise RuntimeError("Connection reset by peer\nwith a trace")
            return getattr(self.store, name)(*arguments)

        return call


@pytest.mark.parametrize("calls", range(0, 40, 3))
def test_a_store_that_fails_at_any_time_leaves_every_process_with_all(group, monkeypatch, calls):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.2))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # which would make the number of calls vary
    group.stores = [hash_stores(1)[0]] * 2
    group.stores[1] = BreakingStore(group.stores[1], calls)
    assert_both_have_all(group)


class OfNothing(dist.Store):
    """As PyTorch 2.13's store of a fake process group."""


class EveryKey:
    """As PyTorch 2.15's store of a fake process group."""

    def check(self, keys):
        return True


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        (None, "the process group has no store"),
        (OfNothing(), "the store of the process group cannot be used (Tried to call pure virtual"),
        (EveryKey(), "the store of the process group cannot be used (it says that it has every key)"),
        (BreakingStore(None, 0), "the store of the process group cannot be used (Connection reset by peer)"),
    ],
)
def test_without_a_store_each_works_alone_and_says_why(group, caplog, store, reason):
    group.stores = [store] * 2
    assert_both_have_all(group)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    for message in caplog.messages:
        assert f"of torch.distributed computes MiCA's minor subspaces alone: {reason}" in message
        assert "\n" not in message
