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


def test_one_after_the_other_on_an_accelerator(tasks, accelerated):
    results = solved_once(tasks)
    assert_as_alone(tasks, results, 1e-6)
    assert all(result.certified for result in results.values())


def test_the_cpu_takes_over_where_an_accelerator_has_no_memory(tasks, accelerated, monkeypatch, caplog):
    solve, first_calls = many.solve, iter(range(4))

    def solve_or_fail(weight, rank):
        if next(first_calls, None) is not None:
            raise torch.OutOfMemoryError("no")
        return solve(weight, rank)

    monkeypatch.setattr(many, "solve", solve_or_fail)
    results = solved_once(tasks)
    assert "out of memory" in caplog.text
    assert_as_alone(tasks, results, 1e-6)


@pytest.mark.usefixtures("anywhere")
def test_an_error_names_the_layer(tasks, monkeypatch):
    monkeypatch.setattr(many, "solve", Mock(side_effect=ArithmeticError("no luck")))
    message = r"^the minor subspace of layer 3 could not be computed: no luck$"
    with pytest.raises(RuntimeError, match=message):
        solved_once(tasks[3:4])


@pytest.mark.usefixtures("anywhere")
def test_the_cache_is_read_and_written(tasks, tmp_path, calls_of):
    solved, hashed = calls_of(many, "solve"), calls_of(many, "content_hash")
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
    monkeypatch.setattr(many, "solve", lambda weight, rank: places.append(weight.device.type))
    solved_once(tasks[1:2], device=told)
    assert places == ["cpu" if told == "cpu" else "meta"]


@pytest.mark.parametrize(("current", "found"), [(None, None), ("mps", None), ("cuda:0", "cuda:0")])
def test_auto_is_the_cpu_where_there_is_no_accelerator(current, found, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: current is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(current))
    assert many.accelerator() == (found and torch.device(found))
