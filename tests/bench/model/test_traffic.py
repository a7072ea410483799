"""Bytes counted by hand, and the order that forms must have."""

import sys

import pytest

from bench.model import traffic

# M 3, K 5, r 1, two layers with N 2 and 4. Bytes: x and dx 30; W 20 and 40; y and dy 12 and 24; h and g 6;
# A and dA 20 in fp32, 10 in bf16; B 8 and 16 in fp32, 4 and 8 in bf16.
PAIR = traffic.Group(3, 5, (2, 4), 1)
BARE = (
    2 * (30 + 20 + 12) + 2 * (30 + 40 + 24) + 3 * 30
)  # the last: autograd reads two dx and writes their sum


def test_bare():
    assert traffic.bare(PAIR) == BARE == 402


def test_ungrouped():
    # x A h | y h B y | dy B g | g x dA | dx g A dx, a layer
    first = (30 + 20 + 6) + (12 + 6 + 8 + 12) + (12 + 8 + 6) + (6 + 30 + 20) + (30 + 6 + 20 + 30)
    second = (30 + 20 + 6) + (24 + 6 + 16 + 24) + (24 + 16 + 6) + (6 + 30 + 20) + (30 + 6 + 20 + 30)
    assert (first, second) == (262, 314)
    assert traffic.ungrouped(PAIR) == BARE + first + second == 978


def test_grouped():
    # x and dx once a group, h, g, A and dA of both layers in one tensor
    shared = (30 + 40 + 12) + (12 + 30 + 40) + (30 + 12 + 40 + 30)
    own = (12 + 6 + 8 + 12) + (12 + 8 + 6) + (24 + 6 + 16 + 24) + (24 + 16 + 6)
    # dx: two GEMMs, the second of which reads what the first wrote, and no sum of two tensors
    base = 2 * (30 + 20 + 12) + 2 * (30 + 40 + 24) + 30
    assert (shared, own, base) == (276, 180, 342)
    assert traffic.grouped(PAIR) == base + shared + own == 798


def test_stock():
    # bf16: x A h | h B hB | scaling | result + | dy scaled | dy B g | g x dA | g A gA | dx + gA, a layer
    forward = (30 + 10 + 6) + (6 + 4 + 12) + 2 * 12 + 3 * 12
    backward = 2 * 12 + (12 + 4 + 6) + (6 + 30 + 10) + (6 + 10 + 30) + 3 * 30
    alone = traffic.Group(3, 5, (2,), 1)
    assert traffic.stock(alone, traffic.BF16) == 2 * (30 + 20 + 12) + forward + backward == 480
    other = traffic.Group(3, 5, (4,), 1)
    pair = sum(traffic.stock(one, traffic.BF16) for one in (alone, other)) + 3 * 30
    assert traffic.stock(PAIR, traffic.BF16) == pair
    # fp32: also dtype changes of x, dy (to and from fp32), result and g A, and a wider adapter
    forward = (30 + 60) + (60 + 20 + 12) + (12 + 8 + 24) + 2 * 24 + (12 + 24 + 24) + (24 + 12)
    backward = 2 * (12 + 24) + 2 * 24 + (24 + 8 + 12) + (12 + 60 + 20) + (12 + 20 + 60) + (60 + 30) + 3 * 30
    assert traffic.stock(alone, traffic.FP32) == 2 * (30 + 20 + 12) + forward + backward


def test_a_group_of_one_moves_what_a_layer_moves():
    alone = traffic.Group(3, 5, (2,), 1)
    assert traffic.grouped(alone) == traffic.ungrouped(alone)
    assert traffic.bare(alone) == 124


@pytest.mark.parametrize("name", traffic.BLOCKS)
def test_blocks(name):
    parts = [*traffic.BLOCKS[name].values()]
    over = {form: traffic.over_bare(form, parts) for form in traffic.FORMS}
    assert over["bare frozen model"] == 1
    assert over["mica.fast, ungrouped"] < over["stock PEFT, bf16 adapters"] < over["stock PEFT"]
    shared = any(len(group.out_features) > 1 for group in parts)
    assert (over["mica.fast, grouped"] < over["mica.fast, ungrouped"]) == shared


def test_what_is_printed_is_labelled(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["traffic"])
    traffic.main()
    printed = capsys.readouterr().out
    assert printed.startswith("COUNTED from shapes, not measured")
    assert all(name in printed for name in (*traffic.BLOCKS, "q/k/v", "gate/up", "block"))
