"""Shared among processes: the same bits everywhere, each its own weights, and none waits forever."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mica.subspace import distributed, many
from mica.subspace.cache import SubspaceCache
from mica.subspace.distributed import shares, solve_shared
from mica.subspace.many import Task
from tests.support import gloo

SHAPES = [(40, 30), (30, 40), (64, 64), (200, 20), (25, 60)]


def make_tasks(seed=0, count=5):
    generator = torch.Generator().manual_seed(seed)
    return [Task(f"layer {i}", torch.randn(SHAPES[i], generator=generator), 4) for i in range(count)]


def solve(tasks, cache=None):
    """{index: basis}, and the shapes that this process solved itself."""
    own, solver = [], many.solve_each

    def counting(weight, rank, **kwargs):
        own.append(tuple(weight.shape))
        return solver(weight, rank, **kwargs)

    many.solve_each = counting
    try:
        subspaces = list(solve_shared(tasks, cache=cache))
    finally:
        many.solve_each = solver
    assert len({index for index, _ in subspaces}) == len(subspaces) == len(tasks)
    return {index: result.basis for index, result in subspaces}, own


def alone(tasks):
    return {index: result.basis for index, result in many.solve_many(tasks)}


def assert_same(bases, expected):
    assert bases.keys() == expected.keys()
    for index in bases:
        assert torch.equal(bases[index], expected[index])


def _same_model(rank):
    return [solve(make_tasks(seed)) for seed in (0, 0, 1)]


def test_each_process_solves_a_share_and_all_hold_the_same_bits():
    first, second = gloo.run(_same_model)
    for seed, (bases, own), (others, theirs) in zip((0, 0, 1), first, second, strict=True):
        expected = alone(make_tasks(seed))
        assert_same(bases, expected)
        assert_same(others, expected)
        assert own
        assert theirs
        assert sorted(own + theirs) == sorted(SHAPES)


def _one_layer_differs(rank):
    tasks = make_tasks()
    if rank:
        tasks[2] = tasks[2]._replace(weight=2 - tasks[2].weight)
    return tasks, *solve(tasks)


def test_weights_of_one_name_and_different_content_are_not_shared():
    results = gloo.run(_one_layer_differs)
    for tasks, bases, own in results:
        assert_same(bases, alone(tasks))
        assert SHAPES[2] in own
    assert sum(len(own) for _, _, own in results) == len(SHAPES) + 1


def _only_one_calls(rank):
    solve(make_tasks())  # all have agreed once
    distributed.PATIENCE = timedelta(seconds=0.5)
    start = time.perf_counter()
    return (*solve(make_tasks()), time.perf_counter() - start) if rank == 0 else None


def test_a_process_that_calls_alone_goes_alone():
    (bases, own, seconds), nothing = gloo.run(_only_one_calls)
    assert nothing is None
    assert_same(bases, alone(make_tasks()))
    assert len(own) == len(SHAPES)
    assert 0.5 <= seconds < 20


def _one_has_no_weights(rank):
    """First it declines, then it has them and takes its share."""
    start = time.perf_counter()
    if rank:
        tasks = make_tasks()
        distributed.decline([task._replace(weight=task.weight.to("meta")) for task in tasks])
        first = None
    else:
        first = solve(make_tasks())
    return first, time.perf_counter() - start, solve(make_tasks())


def test_no_process_waits_for_a_process_without_weights():
    (first, seconds, (bases, own)), (_, _, (others, theirs)) = gloo.run(_one_has_no_weights)
    assert_same(first[0], alone(make_tasks()))
    assert len(first[1]) == len(SHAPES)
    assert seconds < distributed.PATIENCE.total_seconds() / 2
    assert_same(bases, others)
    assert sorted(own + theirs) == sorted(SHAPES)


def _meet_again(calls):
    """What each of ``calls`` gives, and then what a joint call gives, and how long it takes."""
    patience = distributed.PATIENCE
    distributed.PATIENCE = timedelta(seconds=0.5)
    subspaces = [call() for call in calls]
    dist.barrier()
    distributed.PATIENCE = patience
    start = time.perf_counter()
    return subspaces, solve(make_tasks()), time.perf_counter() - start


def assert_met(results):
    owns = [own for _, (_, own), _ in results]
    assert all(owns)
    assert sorted(shape for own in owns for shape in own) == sorted(SHAPES)
    for _, (bases, _), seconds in results:
        assert_same(bases, alone(make_tasks()))
        assert seconds < distributed.PATIENCE.total_seconds() / 2


def _some_have_called_alone(rank, calls):
    return _meet_again([lambda: solve(make_tasks())] * calls[rank])


def test_processes_that_have_called_alone_meet_again():
    calls = (2, 0, 1)
    results = gloo.run(_some_have_called_alone, calls, count=len(calls))
    assert_met(results)
    for (subspaces, _, _), count in zip(results, calls, strict=True):
        assert len(subspaces) == count
        assert all(len(own) == len(SHAPES) for _, own in subspaces)


def _one_comes_too_late(rank):
    if rank:
        time.sleep(1.5)
    return _meet_again([lambda: solve(make_tasks())])


def test_one_that_comes_too_late_goes_alone_too():
    results = gloo.run(_one_comes_too_late)
    for ((bases, own),), _, _ in results:
        assert_same(bases, alone(make_tasks()))
        assert len(own) == len(SHAPES)
    assert_met(results)


def _one_declines_after_another_called_alone(rank):
    """The declined meeting is not the one that was missed."""
    distributed.PATIENCE = timedelta(seconds=0.5)
    if not rank:
        solve(make_tasks())
    dist.barrier()
    distributed.PATIENCE = timedelta(seconds=60)
    start = time.perf_counter()
    if rank:
        distributed.decline(make_tasks())
    dist.barrier()
    return None if rank else len(solve(make_tasks())[1]), time.perf_counter() - start, solve(make_tasks())[1]


def test_declining_works_after_a_call_alone():
    (own, seconds, mine), (_, _, theirs) = gloo.run(_one_declines_after_another_called_alone)
    assert own == len(SHAPES)
    assert seconds < 20
    assert sorted(mine + theirs) == sorted(SHAPES)


def _different_models(rank):
    distributed.PATIENCE = timedelta(seconds=0.5)
    return solve(make_tasks(count=3 + rank))


def test_different_layers_are_not_shared():
    for rank, (bases, own) in enumerate(gloo.run(_different_models)):
        assert_same(bases, alone(make_tasks(count=3 + rank)))
        assert len(own) == 3 + rank


def _one_fails(rank):
    tasks = make_tasks()
    tasks[2].weight[0, 0] = torch.nan  # of the largest layer, which process 0 gets
    return solve(tasks)


def test_an_error_in_one_is_an_error_in_all():
    first, second = gloo.run(_one_fails)
    assert isinstance(first, ValueError)
    assert isinstance(second, ValueError)
    assert str(first).startswith("layer 2: weight must be finite")
    assert str(second) == f"{first} (in process 0)"


def _with_a_cache(rank, folder):
    return [solve(make_tasks(), SubspaceCache(folder))[1] for _ in range(2)]


def test_each_process_asks_the_cache_for_its_share(tmp_path):
    (first, again), (theirs, again_theirs) = gloo.run(_with_a_cache, str(tmp_path))
    assert sorted(first + theirs) == sorted(SHAPES)
    assert not again
    assert not again_theirs


def _without_a_store(rank):
    dist.distributed_c10d._get_default_store = None
    return solve(make_tasks())


def test_without_a_store_to_agree_at_each_goes_alone():
    for bases, own in gloo.run(_without_a_store):
        assert_same(bases, alone(make_tasks()))
        assert len(own) == len(SHAPES)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_nearly_equal_and_complete(count):
    costs = [5.0, 1.0, 1.0, 9.0, 2.0, 4.0, 1.0, 3.0]
    parts = shares(costs, count)
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    loads = [sum(costs[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= 2
    assert shares([], count) == [[]] * count
