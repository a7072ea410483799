"""Merging and unmerging from C++ against PyTorch's operators: same bits, statistics and kept weights."""

import math

import pytest
import torch

from mica.fast.merge import merging
from mica.row_checksums import odd_numbers
from tests.support.cpp import needs_cpp

pytestmark = needs_cpp

BF16, FP32 = torch.bfloat16, torch.float32
both_dtypes = pytest.mark.parametrize("dtype", [BF16, FP32])
EXTREMES = [math.nan, math.inf, -math.inf, 1e-40, -1e-39, 0.0, -0.0, 3e38, -3e38, 1.2e-38]


def weight_and_update(dtype, rows, columns, scale, experts=1, transposed=False):
    """With zeros of both signs, and an s·B·A that rounding swallows in part."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0.0
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = -0.0
    rows //= experts
    if transposed:
        rows, columns = columns, rows
    up = torch.randn(experts, rows, 3, generator=generator)
    up[:, ::7] = 0.0
    down = scale * torch.randn(experts, 3, columns, generator=generator)
    return weight.to(dtype), merging.Update(up, down, transposed)


def bits(tensor):
    return tensor.view(torch.uint8)


def check_same(weight, update, keeps, monkeypatch):
    """The merged weight, what is kept, and the unmerged weight; also unmerged by the other of the two."""
    ours, theirs = weight.clone(), weight.clone()
    monkeypatch.setenv("MICA_NATIVE", "0")
    stats, kept = merging.merge_update(update, theirs, theirs, keeps)
    monkeypatch.setenv("MICA_NATIVE", "1")
    our_stats, our_kept = merging.merge_update(update, ours, ours, keeps)
    assert torch.equal(bits(ours), bits(theirs))
    assert (our_stats.weights, our_stats.unchanged) == (stats.weights, stats.unchanged)
    assert our_stats.update_squared == pytest.approx(stats.update_squared, rel=1e-4, nan_ok=True)
    assert our_stats.error_squared == pytest.approx(stats.error_squared, rel=1e-4, nan_ok=True)
    if not keeps:
        assert our_kept is kept is None
        return
    assert torch.equal(our_kept.checksums, kept.checksums)
    for fields in (our_kept, kept):
        for native in "01":
            merged = ours.clone()
            monkeypatch.setenv("MICA_NATIVE", native)
            assert merging.unmerge_update(update, merged, fields)
            assert torch.equal(bits(merged), bits(weight))
    if torch.isfinite(weight).all() and weight.abs()[weight != 0].min() > 1e-30:
        for field, expected in zip(our_kept.tensors, kept.tensors, strict=True):
            assert field.tolist() == expected.tolist()


@both_dtypes
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 8), (5, 204), (2, 1020), (70, 1000), (600, 520)])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0, 1e4])
def test_merging(dtype, rows, columns, scale, keeps, monkeypatch):
    weight, update = weight_and_update(dtype, rows, columns, scale)
    assert merging.native_module(update, weight) is not None
    check_same(weight, update, keeps, monkeypatch)


@both_dtypes
@pytest.mark.parametrize("transposed", [True, False])
def test_experts_in_several_chunks(dtype, transposed, monkeypatch):
    monkeypatch.setattr(merging, "CHUNK", 1000)
    weight, update = weight_and_update(dtype, 120, 52, 0.1, experts=4, transposed=transposed)
    assert merging.native_module(update, weight) is not None
    check_same(weight, update, True, monkeypatch)


@both_dtypes
@pytest.mark.parametrize("seed", range(20))
def test_extremes(dtype, seed, monkeypatch):
    """NaN and subnormal numbers, which processors round in different ways, are left to PyTorch."""
    generator = torch.Generator().manual_seed(seed)
    weight, update = weight_and_update(dtype, 60, 68, 10.0 ** -(seed % 5))
    at = torch.randint(weight.numel(), (seed + 1,), generator=generator)
    values = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), (seed + 1,), generator=generator)]
    weight.view(-1)[at] = values.to(dtype)
    if seed % 4 == 3:
        update.down[0, 0, seed] = EXTREMES[seed % 3]
    monkeypatch.setattr(merging, "CHUNK", 500)
    for keeps in (True, False):
        check_same(weight, update, keeps, monkeypatch)


@both_dtypes
def test_only_rows_with_such_numbers_are_left_and_kept_whole(dtype):
    weight, update = weight_and_update(dtype, 70, 1000, 1e-3)
    weight[5, 7] = math.nan
    module = merging.native_module(update, weight)
    merge = module.merge_bfloat16 if dtype is torch.bfloat16 else module.merge_float32
    factors = odd_numbers(1000 * weight.element_size() // 8)
    left, _, fields = merge(weight, weight, *update[:3], 70, factors, True, 1)
    assert left.tolist() == [5]
    assert merging.Kept.of(*fields).counts[5] == 1000


@both_dtypes
def test_a_row_that_was_edited_gets_no_old_weights(dtype, monkeypatch):
    weight, update = weight_and_update(dtype, 70, 1000, 0.1)
    merged = weight.clone()
    _, kept = merging.merge_update(update, merged, merged, True)
    merged[3, 4] += 1
    results = []
    for native in "01":
        unmerged = merged.clone()
        monkeypatch.setenv("MICA_NATIVE", native)
        assert not merging.unmerge_update(update, unmerged, kept)
        others = torch.arange(70) != 3
        assert torch.equal(bits(unmerged[others]), bits(weight[others]))
        results.append(unmerged)
    assert torch.equal(bits(results[0]), bits(results[1]))
    assert not torch.equal(results[0][3], weight[3])


@both_dtypes
@pytest.mark.usefixtures("language")
def test_an_edit_that_rounding_swallows_is_seen(dtype):
    weight = torch.full((2, 8), 1e-5, dtype=dtype)
    update = merging.Update(torch.full((1, 2, 1), 1e-20), torch.full((1, 1, 8), 1e-20), False)
    weight[1] = math.nan  # left to PyTorch
    for row in (0, 1):
        merged = weight.clone()
        _, kept = merging.merge_update(update, merged, merged, True)
        kept.checksums[row, 1] += 1
        assert not merging.unmerge_update(update, merged, kept)


@both_dtypes
def test_threads_give_the_same(dtype):
    weight, update = weight_and_update(dtype, 600, 520, 0.1)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            merged = weight.clone()
            stats, kept = merging.merge_update(update, merged, merged, True)
            assert merging.unmerge_update(update, merged.clone(), kept)
            results.append((bits(merged).tolist(), stats, [field.tolist() for field in kept.tensors]))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


@both_dtypes
@pytest.mark.usefixtures("language")
@pytest.mark.parametrize("threads", [(1, 2), (2, 1), (5, 2)])
def test_an_unmerge_by_other_threads_is_exact(dtype, threads, monkeypatch):
    """MKL's fp32 product of (7, 4) and (4, 4096) has other bits on two threads than on one, mostly."""
    weight, update = weight_and_update(dtype, 7, 4096, 0.1)
    merged, before = weight.clone(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads[0])
        _, kept = merging.merge_update(update, merged, merged, True)
        torch.set_num_threads(threads[1])
        used, use = [], torch.set_num_threads
        monkeypatch.setattr(torch, "set_num_threads", lambda count: used.append(count) or use(count))
        assert merging.unmerge_update(update, merged, kept)
        assert used == list(threads)
        assert torch.get_num_threads() == threads[1]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(merged), bits(weight))


@pytest.mark.whole
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("columns", [7, 2**16 + 4])
def test_odd_layouts(dtype, columns, monkeypatch):
    """Rows without whole words of 8 bytes, or with more columns than 16 bits count."""
    weight, update = weight_and_update(dtype, 3, columns, 0.1)
    assert merging.native_module(update, weight) is None
    check_same(weight, update, True, monkeypatch)
