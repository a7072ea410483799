"""Bytes counted by hand and those of the kernels' plans; the README's figures."""

import sys

import pytest
import torch

from bench.measure.machine import ROOT
from bench.model import experts
from bench.model.roofline import BF16, DEVICES, FP32
from mica.kernels.down_projection import down_projection
from mica.kernels.grad_a import grad_a
from mica.kernels.up_projection import up_projection_
from tests.support.static_cases import empty

# 6 rows, 2 experts, K 5, N 3, r 1. Bytes: x and dx 60; y and dy 36; W, W' and dW' 60; A and dA 20, in fp32
# 40; B 12, prepared (16 columns) 192; h and g (16 columns) 192.
SMALL = experts.Stack(6, 2, 5, 3, 1)
BASE = 60 + 60 + 36


def bytes_of(kernels):
    return [kernel.bytes for kernel in kernels]


def test_bare():
    cost = experts.bare(SMALL)
    assert bytes_of(cost.forward) == bytes_of(cost.backward) == [BASE]


@pytest.mark.parametrize(("adapter", "A"), [(BF16, 20), (FP32, 40)])
def test_ours(adapter, A):
    cost = experts.ours(SMALL, adapter)
    # x A h | x W y | y h B y
    assert bytes_of(cost.forward) == [60 + A + 192, BASE, 36 + 192 + 192 + 36]
    # dy B g | g x dA | dy W dx | dx g A dx
    assert bytes_of(cost.backward) == [36 + 192 + 192, 192 + 60 + A, BASE, 60 + 192 + A + 60]
    assert cost.saved == 60


def test_rows_of_tokens_are_gathered_again():
    """6 rows of 3 tokens: 30 bytes are read and 60 written, and 30 kept."""
    cost, rows = (experts.ours(stack, BF16) for stack in (SMALL._replace(top_k=2), SMALL))
    assert bytes_of(cost.backward) == [*bytes_of(rows.backward), 30 + 60]
    assert cost.saved == 30
    assert bytes_of(experts.stock(SMALL._replace(top_k=2), BF16).backward)[-1] != 30 + 60


def test_stock():
    # W A B W' | x W' y; dy W' dx | dy x dW' | dW' B dA
    cost = experts.stock(SMALL, BF16)
    assert bytes_of(cost.forward) == [60 + 20 + 12 + 60, BASE]
    assert bytes_of(cost.backward) == [BASE, BASE, 60 + 12 + 20]
    assert cost.saved == 60 + 60
    wide = experts.stock(SMALL, FP32)
    assert bytes_of(wide.forward) == [40 + 20, 24 + 12, *bytes_of(cost.forward)]
    assert bytes_of(wide.backward) == [*bytes_of(cost.backward), 20 + 40]


@pytest.mark.parametrize("stack", experts.BLOCK)
def test_bytes_are_those_of_the_plans(stack):
    """Each tensor of a launch once, y and dx twice; no sum is split, whose parts would be more."""
    x, y = (
        empty(stack.rows, width, dtype=torch.bfloat16) for width in (stack.in_features, stack.out_features)
    )
    A = empty(stack.experts, stack.rank, stack.in_features, dtype=torch.float32)
    B = empty(stack.experts, stack.out_features, stack.rank, dtype=torch.bfloat16).transpose(1, 2)
    h, offsets = empty(stack.rows, stack.rank, dtype=torch.bfloat16), empty(stack.experts, dtype=torch.int32)
    cost, target = experts.ours(stack, FP32), {"target": "sm_90"}
    down = down_projection.plan(x, A, None, offsets, **target)
    launches = {
        cost.forward[0]: (down, []),
        cost.forward[2]: (up_projection_.plan(y, h, B, None, None, None, offsets, **target), [y]),
        cost.backward[0]: (down_projection.plan(y, B, None, offsets, **target), []),
        cost.backward[1]: (grad_a.plan(h, x, None, offsets, rank=stack.rank, **target), []),
        cost.backward[3]: (up_projection_.plan(x, h, A, None, None, None, offsets, **target), [x]),
    }
    for kernel, (call, again) in launches.items():
        launch = call.bind()[1]
        assert launch.args.get("partial_ptr") is None
        operands = {id(one): one for one in launch.args.values() if isinstance(one, torch.Tensor)}
        moved = sum(one.nbytes for one in (*operands.values(), *again) if one is not offsets)
        assert kernel.bytes == moved, launch.kernel.__name__


def test_the_folding_moves_most_and_keeps_most():
    def both(form):
        costs = [experts.FORMS[form](stack) for stack in experts.BLOCK]
        moved = sum(kernel.bytes for cost in costs for kernel in (*cost.forward, *cost.backward))
        return moved, sum(cost.saved for cost in costs)

    bare, ours, stock = map(both, ("bare experts", "mica, fp32 adapters", "stock PEFT, fp32 adapters"))
    assert bare[0] < ours[0] < stock[0]
    rows_kept = sum(BF16 * one.rows * one.in_features * (1 - 1 / one.top_k) for one in experts.BLOCK)
    assert stock[1] - ours[1] == sum(BF16 * stack.w_numbers for stack in experts.BLOCK) + rows_kept


def test_the_readme_has_these_figures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experts"])
    experts.main()
    label, *rows = capsys.readouterr().out.splitlines()
    assert label.startswith("COUNTED and MODELLED, not measured")
    readme = (ROOT / "kernels/README.md").read_text()
    assert len(rows) == len(experts.FORMS)
    assert not [row for row in rows if row not in readme]
    assert rows[0] == experts.row("bare experts", experts.BLOCK, DEVICES["h100"])
