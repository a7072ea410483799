"""Positions and counts, where bits and values are not the same."""

import pytest
import torch

from mica.fast.merge import bits
from tests.support.tolerances import RELATIVE

NAN = float("nan")
INF = float("inf")


@pytest.mark.parametrize("dtype", RELATIVE)
def test_bits_differ_where_values_are_equal_and_the_other_way_round(dtype):
    left = torch.tensor([[0.0, -0.0, NAN], [INF, -2.0, 3.0]], dtype=dtype)
    right = torch.tensor([[-0.0, 0.0, NAN], [INF, -2.5, 3.0]], dtype=dtype)
    positions = bits.positions_that_differ(left, right)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [0, 1, 4]
    wide = torch.promote_types(dtype, torch.float32)
    assert bits.count_equal(left.to(wide), right.to(wide)) == 4  # all but NaN and -2


@pytest.mark.parametrize("dtype", RELATIVE)
def test_they_read_tensors_of_inference_mode(dtype):
    with torch.inference_mode():
        weight = torch.randn(5, 8, dtype=dtype)
    assert bits.positions_that_differ(weight, weight).numel() == 0
