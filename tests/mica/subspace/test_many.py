"""Many weights at once give what each gives alone."""

import pytest
import torch

from mica import minor_subspace
from mica.subspace import device, many, workers
from mica.subspace.cache import SubspaceCache
from mica.subspace.fingerprint import fingerprint
from mica.subspace.many import Task, cost, solve_many

SHAPES = [(40, 30), (30, 40), (40, 30), (64, 64), (200, 20), (40, 30)]


@pytest.fixture
def tasks():
    return [Task(f"layer {i}", torch.randn(shape), 4 + i % 2) for i, shape in enumerate(SHAPES)]


@pytest.fixture
def accelerated(monkeypatch):
    """Weights on the CPU are taken for an accelerator's: batched by shape."""
    monkeypatch.setattr(device, "ON_HOST", ())


@pytest.fixture
def solved(monkeypatch):
    """Shapes that the solver is called with."""
    calls, solver = [], many.solve_each

    def counting(weight, rank, **kwargs):
        calls.append(tuple(weight.shape))
        return solver(weight, rank, **kwargs)

    monkeypatch.setattr(many, "solve_each", counting)
    return calls


def solved_once(tasks, **kwargs):
    pairs = list(solve_many(tasks, **kwargs))
    assert sorted(index for index, _ in pairs) == list(range(len(tasks)))
    return dict(pairs)


@pytest.mark.parametrize("largest_small", [0, 35, 1000])
def test_each_as_alone(tasks, monkeypatch, largest_small):
    monkeypatch.setattr(workers, "SMALL", largest_small)
    for index, result in solved_once(tasks).items():
        alone = minor_subspace(tasks[index].weight, tasks[index].rank)
        assert torch.equal(result.basis, alone.basis)
        assert torch.equal(result.singular_values, alone.singular_values)


def test_batches_by_shape_and_rank_on_an_accelerator(tasks, accelerated, solved):
    results = solved_once(tasks)
    assert sorted(solved) == [(1, 30, 40), (1, 40, 30), (1, 64, 64), (1, 200, 20), (2, 40, 30)]
    for index, result in results.items():
        alone = minor_subspace(tasks[index].weight, tasks[index].rank)
        torch.testing.assert_close(result.basis, alone.basis, rtol=0, atol=1e-6)
        assert result.certified


def test_batches_are_cut_to_the_memory(accelerated, solved, monkeypatch):
    monkeypatch.setattr(many, "MEMORY_AT_LEAST", 0)
    # 3 fp32 copies of (30, 40) hold no second set of four (30, 30) fp64 matrices
    solved_once([Task(f"layer {i}", torch.randn(30, 40), 3) for i in range(3)])
    assert solved == [(1, 30, 40)] * 3


def test_the_cpu_takes_over_where_an_accelerator_has_no_memory(tasks, accelerated, monkeypatch, caplog):
    def too_much(self, indices, device, rank):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(many.Solver, "solve_together", too_much)
    results = solved_once(tasks)
    assert "out of memory" in caplog.text
    for index, result in results.items():
        alone = minor_subspace(tasks[index].weight, tasks[index].rank)
        torch.testing.assert_close(result.basis, alone.basis, rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", ["host", "accelerator"])
@pytest.mark.parametrize("with_keys", [True, False])
def test_the_cache_is_read_and_written(tasks, where, with_keys, monkeypatch, tmp_path, solved):
    if where == "accelerator":
        monkeypatch.setattr(device, "ON_HOST", ())
    keys = [fingerprint(task.weight) for task in tasks] if with_keys else None
    cache = SubspaceCache(tmp_path)
    first = solved_once(tasks, cache=cache, keys=keys)
    assert len(list(tmp_path.iterdir())) == len(tasks)
    solved.clear()
    if with_keys:
        monkeypatch.setattr(many, "fingerprint", None)  # not again
    second = solved_once(tasks, cache=cache, keys=keys)
    monkeypatch.setattr(many, "fingerprint", fingerprint)
    assert not solved
    for index in first:
        assert torch.equal(first[index].basis, second[index].basis)
    changed = [task._replace(weight=task.weight + 1) for task in tasks]
    solved_once(changed, cache=cache)
    assert solved


def test_without_a_cache_nothing_is_hashed(tasks, monkeypatch):
    monkeypatch.setattr(many, "fingerprint", None)
    solved_once(tasks)


@pytest.mark.parametrize("where", ["host", "accelerator"])
def test_errors_name_the_layer(tasks, where, monkeypatch):
    if where == "accelerator":
        monkeypatch.setattr(device, "ON_HOST", ())
    tasks[3].weight[5, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^layer 3: weight must be finite"):
        list(solve_many(tasks))


def test_weights_on_the_cpu_go_where_they_are_told(tasks, monkeypatch):
    """To the meta device, which everyone has, and where the solver finds no data."""
    with pytest.raises(ValueError, match=r"^layer 0 or layer 2: .*meta device"):
        list(solve_many([tasks[0], tasks[2]._replace(rank=4)], device="meta"))
    monkeypatch.setattr(many, "accelerator", lambda: torch.device("meta"))
    with pytest.raises(ValueError, match=r"^layer 1: .*meta device"):
        list(solve_many(tasks[1:2]))
    solved_once(tasks[1:2], device="cpu")


def test_no_tasks():
    assert list(solve_many([])) == []


def test_cost_grows_with_both_sides():
    small, wide, tall = (Task("", torch.empty(shape), 1) for shape in ((10, 20), (10, 40), (40, 20)))
    assert cost(small) < cost(wide) < cost(tall)


def test_auto_is_the_cpu_where_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert many.accelerator() is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert many.accelerator() is None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda", 0))
    assert many.accelerator() == torch.device("cuda", 0)
