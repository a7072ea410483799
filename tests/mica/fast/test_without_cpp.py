"""Without C++ a call with a small input is PEFT's, also when a checkpoint computes it again."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mica.fast
from mica.fast.forward import fast
from mica.ops import recompute
from tests.support.layer_changes import X, layer_of


@pytest.fixture(autouse=True)
def _inputs_are_small(monkeypatch):
    monkeypatch.setenv("MICA_NATIVE", "0")
    monkeypatch.setattr(recompute, "MIN_NUMBERS", X.numel() + 1)


@pytest.mark.parametrize(
    ("change", "is_left"),
    [
        (lambda patch: None, True),
        (lambda patch: patch.setenv("MICA_BACKEND", "auto"), True),
        (lambda patch: patch.setenv("MICA_BACKEND", "reference"), False),
        (lambda patch: patch.delenv("MICA_NATIVE"), False),
        (lambda patch: patch.setattr(recompute, "MIN_NUMBERS", X.numel()), False),
        (lambda patch: mica.fast.enable(compute_dtype=torch.float32), False),
    ],
    ids=["small", "any path", "a path is demanded", "C++", "as large as it takes", "products in fp32"],
)
def test_explain_says_what_is_left_to_peft(change, is_left, monkeypatch):
    change(monkeypatch)
    layer = layer_of(lora_dropout=0.5)
    before = mica.fast.call_counts["linear"]
    layer(X)
    (row,) = mica.fast.explain(layer).rows
    assert row.path == ("peft" if is_left else "reference")
    assert (row.reason == f"in its last call: {fast.WHY_SMALL}") == is_left
    assert mica.fast.call_counts["linear"] - before == (not is_left)


@pytest.mark.parametrize("small", [X.numel(), X.numel() + 1], ids=["operators", "PEFT"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_draws_the_same_mask_again(use_reentrant, small, monkeypatch):
    """Without gradients at first, or of a parameter whose detached copy comes the second time."""
    monkeypatch.setattr(recompute, "MIN_NUMBERS", small)
    layer = layer_of(lora_dropout=0.5)
    found = []
    for call in layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant):
        torch.manual_seed(1)
        call(torch.nn.Parameter(X)).square().sum().backward()
        found.append(layer.lora_A["default"].weight.grad)
        layer.zero_grad()
    assert torch.equal(*found)
