"""Without C++ a call with a small input is PEFT's, also when a checkpoint computes it again.

And what has C++ compiled, which takes long, and what has not.
"""

import pytest
import torch
from peft.tuners import lora
from torch.utils.checkpoint import checkpoint

import mica.fast
from mica.fast.forward import fast
from mica.native import build
from mica.ops import recompute
from tests.support.layer_changes import X, layer_of
from tests.support.models import ADAPTERS, INDICES, net, randomise


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


# -- what has it compiled ------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The folders for which a compiler was wanted, in what looks like a new process without a compiler."""
    folders = []

    def ensure_built(folder, source):
        folders.append(folder)
        raise build.BuildError("no compiler")

    monkeypatch.setattr(build, "ensure_built", ensure_built)
    monkeypatch.setattr(fast, "_function", None)
    monkeypatch.setenv("MICA_NATIVE", str(tmp_path))
    return folders


def runs(model, x=INDICES):
    """One step, and what is said of it before and after."""
    mica.fast.explain(model)
    for parameter in model.parameters():
        parameter.grad = None
    out = model(x)
    if out.requires_grad:
        out.sum().backward()
    mica.fast.explain(model)


def in_another_dtype(model):
    model.base_model.model.up.lora_A.double()
    model.base_model.model.up.lora_B.double()


LORA = {"init_lora_weights": False}
PEFT_S = {
    "LoRA": (LORA, None),
    "DoRA": (LORA | {"use_dora": True}, None),
    "an embedding": ({"targets": ["embed"]}, None),
    "disabled adapters": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "a merged adapter": ({}, lambda model: model.merge_adapter()),
    "an adapter of another dtype": ({}, in_another_dtype),
    "another class": ({}, lambda model: setattr(model.base_model.model.up, "__class__", OtherLinear)),
    "nothing but a backend that is off": ({}, lambda model: mica.fast.disable()),
}


class OtherLinear(lora.Linear):
    """One that somebody has derived."""


@pytest.mark.parametrize("name", PEFT_S)
@pytest.mark.parametrize("small", [X.numel(), 2**20], ids=["large", "small"])
def test_no_layer_that_peft_runs_has_cpp_compiled(name, small, compiled, monkeypatch):
    monkeypatch.setattr(recompute, "MIN_NUMBERS", small)
    options, change = PEFT_S[name]
    model = randomise(net(**{"targets": ["up"]} | options))
    if change is not None:
        change(model)
    runs(model)
    assert not compiled


def test_no_layer_without_numbers_has_cpp_compiled(compiled):
    model = net(targets=["up"]).to("meta")
    runs(model, INDICES.to("meta"))
    assert not compiled


@pytest.mark.parametrize("adapter", ADAPTERS, indirect=True)
def test_the_first_layer_that_runs_here_has_cpp_compiled(adapter, compiled, tmp_path):
    """And not `explain` before it. Without a compiler already its first call is decided as all others."""
    layer = layer_of(adapter=adapter)
    mica.fast.explain(layer)
    assert not compiled
    for _ in range(2):
        layer(X)
        assert compiled == [tmp_path]
        (row,) = mica.fast.explain(layer).rows
        assert (row.path, row.reason) == ("peft", f"in its last call: {fast.WHY_SMALL}")
