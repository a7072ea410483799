"""Batches as an accelerator solves them, here on the CPU: judged one by one, none drags others down."""

import pytest
import torch

from mica.subspace import device, krylov, minor_subspace, solver
from mica.subspace.device import batch_size, try_batch
from mica.subspace.solver import solve_stack
from tests.support.judging import judge
from tests.support.spectra import NULL, RANK, SPECTRA, stack

SHAPES = [(200, 140), (140, 200), (150, 150), (60, 40), (40, 60)]
EASY = ["gaussian", "hard edge", "times 1e4", "row scales"]


def solved(matrices: torch.Tensor, rank: int = RANK) -> dict:
    """Each judged, by index."""
    results = try_batch(matrices, rank)
    assert len(results) == len(matrices)
    found = {index: result for index, result in enumerate(results) if result is not None}
    for index, result in found.items():
        judge(matrices[index], result)
        assert result.certified
    return found


@pytest.fixture
def made(calls_of):
    """The matrices of every ``BatchGram`` that is made, as one-tuples."""
    return calls_of(device, "BatchGram")


@pytest.mark.parametrize("method", ["krylov", "gram"])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 140)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_every_spectrum_leaves_the_others_alone(name, shape, method, monkeypatch):
    monkeypatch.setattr(device, "batch_method", lambda size, rank: method)
    results = solved(stack(["gaussian", name, "row scales"], shape))
    tall, room = shape[0] > shape[1], krylov.fits(min(shape), RANK)
    if method == "krylov" and not room:
        assert not results
        return
    assert results.keys() >= {0, 2}
    for result in results.values():
        assert result.null_count == 0
        assert result.method == method
    if tall and name in NULL:
        assert 1 not in results
    if method == "gram" and not (tall and (name in NULL or name.startswith("graded"))):
        assert 1 in results


@pytest.mark.parametrize("shape", [(200, 140), (140, 200)], ids=str)
def test_what_is_not_certified_is_tried_alone_and_then_left_out(shape, made, monkeypatch):
    judged = device.judge

    def refusing(problem, triplets):
        """The matrix of small numbers is never certified."""
        judgement = judged(problem, triplets)
        small = judgement.singular_values[..., 0] < 1e-1
        return judgement._replace(certified=judgement.certified & ~small)

    monkeypatch.setattr(device, "judge", refusing)
    assert solved(stack(["gaussian", "times 1e-4", "times 1e4"], shape)).keys() == {0, 2}
    assert [len(tall) for (tall,) in made] == [3, 1]


@pytest.mark.parametrize("shape", [(60, 40), (140, 200)], ids=str)
def test_what_is_the_host_s_from_the_start(shape, made):
    matrices, size = stack(EASY, shape), min(shape)
    assert not solved(matrices, 3 * size // 4 + 1)
    assert not made
    assert solved(matrices, 3 * size // 4).keys() == {0, 1, 2, 3}


# Shapes, GiB of free memory, and how many at once: a quarter of it for four fp64 matrices of the short side
# and two fp32 weights each.
BATCH_SIZES = {
    ((576, 576), 1): 8, ((576, 1536), 0.5): 7, ((1024, 4096), 0.5): 2, ((1024, 4096), 1): 4,
    ((4096, 1024), 2): 8, ((1024, 128256), 20): 4, ((128256, 1024), 10): 2, ((4096, 4096), 70): 1,
    ((100, 300), 0): 1,
    # large ones are solved one by one
    ((1535, 9000), 1024): 8, ((9000, 1535), 1024): 8, ((1536, 9000), 1024): 1, ((9000, 1536), 1024): 1,
}  # fmt: skip


def test_batch_sizes(monkeypatch):
    for (shape, free), expected in BATCH_SIZES.items():
        monkeypatch.setattr(device, "free_memory", lambda where, free=free: int(free * 2**30))
        assert batch_size(*shape, torch.device("cuda")) == expected


def test_free_memory_is_the_device_s_and_what_pytorch_holds_unused(monkeypatch):
    for name, value in (("mem_get_info", (1000, 9000)), ("memory_reserved", 70), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda where, value=value: value)
    assert device.free_memory(torch.device("cuda")) == 1040
    assert batch_size(576, 576, torch.device("meta")) == 8  # whatever does not tell


@pytest.mark.parametrize("count", [1, 5, 6])
@pytest.mark.parametrize("shape", [(200, 140), (40, 60)], ids=str)
@pytest.mark.parametrize("at_a_time", [1, 2, 10])
def test_a_stack_is_solved_in_batches_on_an_accelerator(count, shape, at_a_time, monkeypatch, calls_of):
    """With what the batches leave out from the host."""
    names = ["gaussian", "rank 5", "row scales", "times 1e4", "zero", "times 1e-4"][:count]
    matrices, batches = stack(names, shape), calls_of(solver, "try_batch")
    with monkeypatch.context() as patch:
        patch.setattr(device, "ON_HOST", ())
        patch.setattr(solver, "batch_size", lambda *arguments: at_a_time)
        results = solve_stack(matrices, RANK)
    sizes = [len(matrices) for matrices, *_ in batches]
    assert sizes == [min(at_a_time, count - start) for start in range(0, count, at_a_time)]
    in_batches = "krylov" if krylov.fits(min(shape), RANK) else "gram"
    for name, matrix, result in zip(names, matrices, results, strict=True):
        assert result.certified
        assert result.method == ("svd" if shape[0] > shape[1] and name in NULL else in_batches)
        if name not in NULL:
            single = minor_subspace(matrix, RANK)
            torch.testing.assert_close(result.basis, single.basis, rtol=0, atol=2e-6)
            torch.testing.assert_close(result.singular_values, single.singular_values)
