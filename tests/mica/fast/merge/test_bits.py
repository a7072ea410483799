"""Positions, counts and fingerprints, where bits and values are not the same."""

import itertools

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
    assert bits.fingerprint(weight).shape == (5,)


def test_a_fingerprint_begun_in_inference_mode_is_the_same_outside():
    bits._odd_numbers.cache_clear()
    weight = torch.randn(5, 8)
    with torch.inference_mode():
        inside = bits.fingerprint(weight).clone()
    assert torch.equal(bits.fingerprint(weight), inside)
    bits._odd_numbers.cache_clear()
    assert torch.equal(bits.fingerprint(weight), inside)


def test_a_part_of_a_weight_has_its_part_of_the_fingerprint():
    weight = torch.randn(40, 9, dtype=torch.bfloat16)
    assert torch.equal(bits.fingerprint(weight[7:30].clone()), bits.fingerprint(weight)[7:30])


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(12, 20), (7, 9)], ids=["whole words", "odd"])
def test_weights_at_other_places_are_seen(dtype, dim, shape):
    """Every exchange of two rows or columns of a weight, and every change of one sign."""
    weight = torch.randn(shape, dtype=dtype)
    fingerprint = bits.fingerprint(weight)
    assert fingerprint.shape == weight.shape[:1]
    for one, other in itertools.combinations(range(weight.shape[dim]), 2):
        order = list(range(weight.shape[dim]))
        order[one], order[other] = other, one
        moved = weight.index_select(dim, torch.tensor(order))
        assert not torch.equal(bits.fingerprint(moved), fingerprint)
    for place in itertools.product(*map(range, shape)):
        negated = weight.clone()
        negated[place] *= -1
        changed = bits.fingerprint(negated) != fingerprint
        assert changed.nonzero().flatten().tolist() == [place[0]]
