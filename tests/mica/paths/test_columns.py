"""Columns that are scaled and summed, by parts and at once, against fp64."""

import pytest
import torch

from mica.paths import columns
from tests.support.tolerances import RELATIVE, error

FP32 = torch.float32


@pytest.fixture(params=[2**17, 20], ids=["at once", "by parts"])
def _parts(request, monkeypatch):
    monkeypatch.setattr(columns, "_CACHED", request.param)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("addend", ["none", "row", "matrix"])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
def test_multiply_add(dtype, addend):
    z, factor = torch.randn(11, 7, dtype=dtype), torch.randn(7)
    more = {"none": None, "row": torch.randn(7), "matrix": torch.randn(11, 7, dtype=dtype)}[addend]
    exact = z.double() * factor.double() + (0.0 if more is None else more.double())
    out = torch.full_like(z, float("nan"))
    assert columns.multiply_add(z, factor, more, out) is out
    assert error(out, exact) <= RELATIVE[dtype]
    into = more if addend == "matrix" else z  # in place
    assert torch.equal(columns.multiply_add(z, factor, more, into), out)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
def test_grad_magnitude(dtype):
    dy, z = torch.randn(2, 11, 7, dtype=dtype)
    factor = torch.randn(7)
    dz, sums = columns.grad_magnitude(dy.t().contiguous().t(), z, factor)
    exact = dy.double() * z.double()
    assert error(dz, dy.double() * factor.double()) <= RELATIVE[dtype]
    assert error(sums, exact.sum(0)) <= RELATIVE[FP32]
    assert dz.is_contiguous()
    assert (dz.dtype, sums.dtype) == (dtype, FP32)


def test_what_is_widened_at_a_time():
    """Numbers of a matrix: few on a CPU, whose cache they fill, more where no memory is shared with it."""
    shape = 5000, 4096
    largest = {}
    for device in ("cpu", "meta"):
        parts = list(columns._parts(torch.empty(shape, dtype=torch.bfloat16, device=device)))
        assert sum(len(part) for (part,) in parts) == shape[0]
        largest[device] = max(part.numel() for (part,) in parts)
    assert largest == {"cpu": 2**17, "meta": 2**24}
