"""Batches as an accelerator solves them, here on the CPU: judged one by one, none drags others down."""

import math
import warnings

import pytest
import torch

from mica.subspace import batched, device, krylov, minor_subspace, solver
from mica.subspace.device import batch_size, solve_batch
from tests.support.judging import judge
from tests.support.spectra import NULL, RANK, SPECTRA, weight

SHAPES = [(200, 140), (140, 200), (150, 150), (60, 40), (40, 60)]
EASY = ["gaussian", "hard edge", "times 1e4", "row scales"]


def solved(matrices: torch.Tensor, method: str = "auto", strict: bool = True, rank: int = RANK) -> dict:
    pairs = list(solve_batch(matrices, rank, method, strict, 0))
    assert len(dict(pairs)) == len(pairs)  # each once
    return dict(pairs)


def stack(names, shape) -> torch.Tensor:
    return torch.stack([weight(name, *shape) for name in names])


@pytest.fixture
def weak_fp64(monkeypatch):
    monkeypatch.setattr(batched, "has_weak_fp64", lambda device: True)


@pytest.fixture
def recorded(monkeypatch):
    """(number of matrices, mixed) of every ``BatchGram`` that is made."""
    made = []

    class Recorded(batched.BatchGram):
        def __init__(self, tall, mixed=False):
            made.append((len(tall), mixed))
            super().__init__(tall, mixed)

    monkeypatch.setattr(device, "BatchGram", Recorded)
    return made


@pytest.mark.parametrize("method", ["krylov", "gram"])
@pytest.mark.parametrize(
    ("shape", "weak"), [*((shape, False) for shape in SHAPES), ((300, 140), True)], ids=str
)
@pytest.mark.parametrize("name", SPECTRA)
def test_every_spectrum(name, shape, method, weak, monkeypatch):
    monkeypatch.setattr(batched, "has_weak_fp64", lambda device: weak)
    matrices = stack([name, "gaussian"], shape)
    results = solved(matrices, method)
    tall, room = shape[0] > shape[1], krylov.fits(min(shape), RANK)
    if method == "krylov" and not room:
        assert not results
        return
    assert results[1].method in ("krylov", "gram")
    for index, result in results.items():
        judge(matrices[index], result)
        assert result.certified
        assert result.null_count == 0
        assert result.method == ("krylov" if method != "gram" and room else "gram")
    if tall and name in NULL:
        assert 0 not in results
    if method == "gram" and not (tall and (name in NULL or name.startswith("graded"))):
        assert 0 in results


@pytest.mark.parametrize("shape", [(200, 140), (140, 200), (60, 40)], ids=str)
@pytest.mark.parametrize("trouble", ["zero", "rank deficient by 3", "rank 5", "graded to 1e-7"])
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("weak", [False, True])
def test_a_matrix_in_trouble_leaves_the_others_alone(shape, trouble, position, weak, monkeypatch):
    monkeypatch.setattr(batched, "has_weak_fp64", lambda device: weak)
    names = ["gaussian", "row scales"]
    names.insert(position, trouble)
    matrices = stack(names, shape)
    results = solved(matrices)
    assert results.keys() >= set(range(3)) - {position}
    for index, result in results.items():
        judge(matrices[index], result)
        assert result.certified


@pytest.mark.parametrize("shape", [(200, 140), (140, 200)], ids=str)
def test_what_is_not_certified_is_tried_alone_and_then_left_out(shape, recorded, monkeypatch):
    judged = device.judged

    def refusing(problem, triplets, strict):
        """The matrix of small numbers is never certified."""
        judgement = judged(problem, triplets, strict)
        small = judgement.singular_values[..., 0] < 1e-1
        return judgement._replace(certified=judgement.certified & ~small)

    monkeypatch.setattr(device, "judged", refusing)
    matrices = stack(["gaussian", "times 1e-4", "times 1e4"], shape)
    assert solved(matrices).keys() == {0, 2}
    assert recorded == [(3, False), (1, False)]


@pytest.mark.parametrize("method", ["auto", "krylov", "gram"])
@pytest.mark.parametrize("shape", [(300, 140), (140, 300)], ids=str)
def test_mixed_products_where_they_suffice_else_fp64(shape, method, weak_fp64, recorded):
    """fp32 products lose σ² below 1e-7 ‖W‖², and what loses it is solved again."""
    matrices = stack(["gaussian", "tail x 1e-6", "times 1e4"], shape)
    results = solved(matrices, method)
    assert results.keys() >= {0, 2}
    for index, result in results.items():
        judge(matrices[index], result)
    assert recorded[0] == (3, True)
    assert len(recorded) > 1
    assert all(not mixed for _, mixed in recorded[1:])

    recorded.clear()
    assert solved(matrices[::2], method).keys() == {0, 1}
    assert recorded == [(2, True)]


def test_a_users_autocast_does_not_reach_mixed_products(weak_fp64, recorded, monkeypatch):
    """`get_peft_model` within autocast, where fp64 is slow."""
    monkeypatch.setattr(solver, "is_on_host", lambda device: False)
    matrices = stack(["gaussian", "hard edge"], (300, 140))
    expected = solver.solve_each(matrices, RANK)
    with torch.autocast("cpu", torch.bfloat16):
        results = solver.solve_each(matrices, RANK)
    assert recorded[0] == (2, True)
    assert all(torch.equal(one.basis, other.basis) for one, other in zip(results, expected, strict=True))


def test_a_users_precision_does_not_reach_mixed_products(weak_fp64, recorded, request):
    matrices = stack(["gaussian", "gaussian"], (600, 300))
    expected = solved(matrices)
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("medium")  # with which some processors, too, multiply in bf16
    results = solved(matrices)
    assert recorded == [(2, True)] * 2
    for index, result in results.items():
        assert result.certified
        assert torch.equal(result.basis, expected[index].basis)
        assert result.energy_excess == expected[index].energy_excess


@pytest.mark.parametrize("count", [1, 2])
def test_what_mixed_products_do_not_settle_is_next_a_batch_in_fp64(count, weak_fp64, recorded):
    matrices = stack(["tail x 1e-6", "graded to 1.6e-6"][:count], (140, 300))
    results = solved(matrices, "gram")
    assert results.keys() == set(range(count))
    assert recorded == [(count, True), (count, False)]
    for index, result in results.items():
        judge(matrices[index], result)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_mixed_products_that_overflow_or_underflow(scale, weak_fp64):
    matrices = stack(["gaussian", "hard edge"], (40, 100)) * scale
    results = solved(matrices)
    assert results.keys() == {0, 1}
    for index, result in results.items():
        judge(matrices[index], result)


@pytest.mark.parametrize("shape", [(200, 140), (200, 150)], ids=str)
def test_square_and_strong_ones_are_not_mixed(shape, weak_fp64, recorded, monkeypatch):
    solved(stack(EASY, (150, 150)), "gram")
    monkeypatch.setattr(batched, "has_weak_fp64", lambda device: False)
    solved(stack(EASY, (100, 40)), "gram")
    assert recorded == [(4, False)] * 2


@pytest.mark.parametrize("shape", [(60, 40), (140, 200)], ids=str)
def test_what_is_the_host_s_from_the_start(shape, recorded):
    matrices, size = stack(EASY, shape), min(shape)
    assert not solved(matrices, "svd")
    assert not solved(matrices, "auto", rank=3 * size // 4 + 1)
    assert not solved(matrices, "krylov", rank=3 * size // 4)
    assert not recorded
    assert solved(matrices, "auto", rank=3 * size // 4).keys() == {0, 1, 2, 3}


@pytest.mark.parametrize("method", ["auto", "gram"])
@pytest.mark.parametrize("shape", [(200, 140), (140, 200)], ids=str)
def test_without_strict_all_but_the_null_are_returned(shape, method, monkeypatch):
    monkeypatch.setattr(batched.BatchGram, "exceeds", None)  # no factorisation for a proof
    matrices = stack([*EASY, "rank 5"], shape)
    results = solved(matrices, method, strict=False)
    assert results.keys() == set(range(4 if shape[0] > shape[1] else 5))
    for index, result in results.items():
        judge(matrices[index], result)
        assert not result.certified
        assert 0 <= result.energy_excess <= 1 + 1e-5


@pytest.mark.parametrize(
    ("shape", "memory", "expected"),
    [
        ((576, 576), None, (256 << 20) // (4 * 8 * 576**2)),
        ((576, 1536), None, (256 << 20) // (4 * 8 * 576**2)),
        ((4096, 4096), None, 1),
        ((4096, 14336), None, 3 * 4 * 4096 * 14336 // (4 * 8 * 4096**2)),
        ((128, 200_000), None, 3 * 4 * 128 * 200_000 // (4 * 8 * 128**2)),
        ((100, 300), 32 * 100**2 * 7, 7),
        ((300, 100), 32 * 100**2 * 7 - 1, 6),
        ((300, 100), 1, 1),
    ],
)
def test_batch_sizes(shape, memory, expected):
    assert batch_size(*shape, memory) == expected


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(200, 140), (40, 60)], ids=str)
@pytest.mark.parametrize("at_a_time", [1, 2, 10])
def test_minor_subspace_takes_batches_for_an_accelerator(leading, shape, at_a_time, monkeypatch):
    """With what the batches leave out from the host, everything where it belongs."""
    sizes = []

    def seen(matrices, *arguments):
        sizes.append(len(matrices))
        return solve_batch(matrices, *arguments)

    monkeypatch.setattr(solver, "is_on_host", lambda device: False)
    monkeypatch.setattr(solver, "solve_batch", seen)
    monkeypatch.setattr(solver, "batch_size", lambda *arguments: at_a_time)
    count = math.prod(leading)
    names = ["gaussian", "rank 5", "row scales", "times 1e4", "zero", "times 1e-4"][:count]
    matrices = stack(names, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = minor_subspace(matrices.reshape(*leading, *shape), RANK)
    assert sizes == [min(at_a_time, count - start) for start in range(0, count, at_a_time)]
    assert result.certified
    assert result.method == ("svd" if shape[0] > shape[1] and count > 1 else krylov_or_gram(shape))
    bases, values = result.basis.reshape(-1, shape[0], RANK), result.singular_values.reshape(-1, RANK)
    monkeypatch.undo()
    for index, matrix in enumerate(matrices):
        if names[index] not in NULL:
            single = minor_subspace(matrix, RANK)
            torch.testing.assert_close(bases[index], single.basis, rtol=0, atol=2e-6)
            torch.testing.assert_close(values[index], single.singular_values)


def krylov_or_gram(shape) -> str:
    return "krylov" if krylov.fits(min(shape), RANK) else "gram"


def test_extreme_numbers_are_the_host_s(monkeypatch):
    monkeypatch.setattr(solver, "is_on_host", lambda device: False)
    monkeypatch.setattr(solver, "solve_batch", None)
    matrix = weight("gaussian", 60, 40).double()
    assert minor_subspace(torch.stack([matrix, matrix * 2.0**300]), RANK).certified
