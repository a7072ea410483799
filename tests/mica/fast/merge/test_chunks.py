"""One pass in C++ over a part of a weight against PyTorch's operators: same bits, positions and counts."""

import math

import pytest
import torch

from mica import native
from mica.fast.merge import merging
from mica.row_checksums import row_checksums

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.why_not()))

BF16, FP32 = torch.bfloat16, torch.float32
both_dtypes = pytest.mark.parametrize("dtype", [BF16, FP32])


def chunk(dtype, rows, columns, scale):
    """A part of a weight with zeros of both signs, and an s·B·A that rounding swallows in part."""
    generator = torch.Generator().manual_seed(rows)
    old = torch.randn(rows, columns, generator=generator)
    old[torch.rand(rows, columns, generator=generator) < 0.1] = 0.0
    old[torch.rand(rows, columns, generator=generator) < 0.1] = -0.0
    delta = scale * torch.randn(rows, columns, generator=generator)
    delta[torch.rand(rows, columns, generator=generator) < 0.1] = 0.0
    return old.to(dtype), delta


def agree(ours, expected):
    assert torch.equal(ours.new.view(torch.uint8), expected.new.view(torch.uint8))
    assert ours.stats.unchanged == expected.stats.unchanged
    if expected.lost is None:
        assert ours.lost is None
    else:
        assert ours.lost.tolist() == expected.lost.tolist()
    assert ours.stats.update_squared == pytest.approx(expected.stats.update_squared, rel=1e-4)
    assert ours.stats.error_squared == pytest.approx(expected.stats.error_squared, rel=1e-4)


@both_dtypes
@pytest.mark.parametrize("needs_lost", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (1, 1023), (5, 205), (70, 1000)])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0, 1e4])
def test_merging(dtype, rows, columns, scale, needs_lost):
    old, delta = chunk(dtype, rows, columns, scale)
    before = old.clone()
    ours = merging.merge_by_native(old, delta, needs_lost)
    ours = ours._replace(new=ours.new.clone())
    agree(ours, merging.merge_by_torch(old, delta, needs_lost))
    assert torch.equal(old.view(torch.uint8), before.view(torch.uint8))


@both_dtypes
@pytest.mark.parametrize("value", [math.nan, 1e-40, -1e-39])
def test_what_processors_round_in_different_ways_is_left_to_pytorch(dtype, value):
    old, delta = chunk(dtype, 70, 1000, 0.0)
    old[-1, -1] = value
    assert merging.merge_by_native(old, delta, True) is None
    new = torch.empty_like(old)
    assert not native.module().subtract_chunk(new, old, delta)


@pytest.mark.parametrize("shape", [(1, 4), (7, 12), (3000, 64), (5, 4096)])
def test_sums_of_rows(shape, monkeypatch):
    weight = torch.randn(shape).bfloat16()
    ours = row_checksums(weight)
    monkeypatch.setenv("MICA_NATIVE", "0")
    assert torch.equal(row_checksums(weight), ours)
