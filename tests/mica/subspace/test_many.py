"""Many weights at once give what each gives alone."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from mica import minor_subspace
from mica.subspace import device, many, threads
from mica.subspace.cache import SubspaceCache
from mica.subspace.content_hash import content_hash
from mica.subspace.many import Task, run_tasks

SHAPES = [(40, 30), (30, 40), (40, 30), (64, 64), (200, 20), (40, 30)]


@pytest.fixture
def tasks():
    return [Task(f"layer {i}", torch.randn(shape), 4 + i % 2) for i, shape in enumerate(SHAPES)]


@pytest.fixture(params=[("cpu", "mps"), ()], ids=["host", "accelerator"])
def anywhere(request, monkeypatch):
    monkeypatch.setattr(device, "ON_HOST", request.param)


def solved_once(tasks, **kwargs):
    pairs = list(run_tasks(tasks, range(len(tasks)), **kwargs))
    assert sorted(index for index, _ in pairs) == list(range(len(tasks)))
    return dict(pairs)


def assert_as_alone(tasks, results, tolerance=0.0):
    for index, result in results.items():
        alone = minor_subspace(tasks[index].weight, tasks[index].rank)
        torch.testing.assert_close(result.basis, alone.basis, rtol=0, atol=tolerance)
        torch.testing.assert_close(result.singular_values, alone.singular_values, rtol=tolerance, atol=0)


@pytest.mark.parametrize("largest_small", [0, 35, 1000])
def test_each_as_alone_and_without_a_cache_nothing_is_hashed(tasks, monkeypatch, largest_small):
    monkeypatch.setattr(threads, "SMALL", largest_small)
    monkeypatch.setattr(many, "content_hash", None)
    assert_as_alone(tasks, solved_once(tasks))
    assert list(run_tasks(tasks, [])) == []
    assert [index for index, _ in run_tasks(tasks, [2])] == [2]


def test_batches_by_shape_and_rank_on_an_accelerator(tasks, accelerated, calls_of):
    solved = calls_of(many, "solve_stack")
    results = solved_once(tasks)
    shapes = sorted(tuple(weights.shape) for weights, _ in solved)
    assert shapes == [(1, 30, 40), (1, 40, 30), (1, 64, 64), (1, 200, 20), (2, 40, 30)]
    assert_as_alone(tasks, results, 1e-6)
    assert all(result.certified for result in results.values())


def test_batches_are_cut_to_the_memory(accelerated, calls_of, monkeypatch):
    solved = calls_of(many, "solve_stack")
    # of a quarter, four (30, 30) fp64 matrices and two fp32 copies of (30, 40) take more than a half
    monkeypatch.setattr(device, "free_memory", lambda where: 4 * 70_000)
    solved_once([Task(f"layer {i}", torch.randn(30, 40), 3) for i in range(3)])
    assert [weights.shape for weights, _ in solved] == [(1, 30, 40)] * 3


def test_the_cpu_takes_over_where_an_accelerator_has_no_memory(tasks, accelerated, monkeypatch, caplog):
    solve, first_calls = many.solve_stack, iter(range(4))  # of the four shapes

    def solve_stack(weights, rank):
        if next(first_calls, None) is not None:
            raise torch.OutOfMemoryError("no")
        assert len(weights) == 1
        return solve(weights, rank)

    monkeypatch.setattr(many, "solve_stack", solve_stack)
    results = solved_once(tasks)
    assert "out of memory" in caplog.text
    assert_as_alone(tasks, results, 1e-6)


@pytest.mark.usefixtures("anywhere")
def test_an_error_names_the_layer(tasks, monkeypatch):
    monkeypatch.setattr(many, "solve_stack", Mock(side_effect=ArithmeticError("no luck")))
    message = r"^the minor subspace of layer 3 could not be computed: no luck$"
    with pytest.raises(RuntimeError, match=message):
        solved_once(tasks[3:4])


@pytest.mark.usefixtures("anywhere")
def test_the_cache_is_read_and_written(tasks, tmp_path, calls_of):
    solved, hashed = calls_of(many, "solve_stack"), calls_of(many, "content_hash")
    cache = SubspaceCache(tmp_path)
    first = solved_once(tasks, cache=cache)
    assert len(list(tmp_path.iterdir())) == len(tasks)
    solved.clear()
    second = solved_once(tasks, cache=cache)
    assert not solved
    assert len(hashed) == len(tasks)  # each once, whoever asks for its key
    assert all(torch.equal(first[index].basis, second[index].basis) for index in first)
    solved_once([replace(task, weight=task.weight + 1) for task in tasks], cache=cache)
    assert solved


def test_the_key_of_a_task_is_that_of_its_whole_weight():
    """Processes share the work on weights of one key."""
    weight = torch.randn(40, 30)
    assert Task("layer", weight, 4).key == content_hash(weight)


@pytest.mark.parametrize("told", ["auto", "meta", "cpu"])
def test_weights_on_the_cpu_go_where_they_are_told(told, tasks, monkeypatch):
    places = []
    monkeypatch.setattr(many, "accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(many, "move", lambda result, device: result)
    monkeypatch.setattr(
        many, "solve_stack", lambda weights, rank: places.append(weights.device.type) or [None]
    )
    solved_once(tasks[1:2], device=told)
    assert places == ["cpu" if told == "cpu" else "meta"]


@pytest.mark.parametrize(("current", "found"), [(None, None), ("mps", None), ("cuda:0", "cuda:0")])
def test_auto_is_the_cpu_where_there_is_no_accelerator(current, found, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: current is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(current))
    assert many.accelerator() == (found and torch.device(found))
