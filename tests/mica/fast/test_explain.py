"""What `mica.fast.explain` reports, and its table in print: equal rows as one line, and the totals."""

import functools
import itertools
import re
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import mica.fast
from mica.fast.explain import patterns
from tests.support.models import TARGETS, net, tiny_llama, wrap
from tests.support.quantised_models import adapted
from tests.support.quantised_models import logits as quantised_logits


def test_one_row_per_layer():
    explanation = mica.fast.explain(net())
    assert [row.name.rsplit(".", 1)[1] for row in explanation.rows] == TARGETS
    assert [row.layer for row in explanation.rows] == ["Embedding", "Linear", "Conv1D", "Linear"]
    assert {row.adapter for row in explanation.rows} == {"default (MiCA)"}
    assert explanation.counts() == {"reference": 4}


def test_the_table_prints_and_aligns():
    model = net()
    model.base_model.model.down.base_layer.weight.requires_grad_()
    lines = str(mica.fast.explain(model)).splitlines()
    assert len(lines) == 6
    assert lines[4].endswith("; base layer called: the base weight is trainable")
    assert len({line.index("default") for line in lines[1:-1]}) == 1
    assert lines[5] == "4 layers: 4 reference"
    assert str(mica.fast.explain(nn.Linear(2, 2))) == "no adapted layers"


@pytest.mark.parametrize(
    ("backend", "path", "reason"),
    [
        ("triton", "kernel", ""),
        ("reference", "reference", "MICA_BACKEND=reference"),
        (
            "auto",
            "reference",
            "TRITON_INTERPRET=1, and interpreted kernels run only with MICA_BACKEND=triton",
        ),
    ],
)
def test_the_backend_is_said_and_taken(monkeypatch, backend, path, reason):
    monkeypatch.setenv("MICA_BACKEND", backend)
    model = net()
    embedding, *others = mica.fast.explain(model).rows
    assert {(row.path, row.reason) for row in others} == {(path, reason)}
    assert (embedding.path, embedding.reason) == ("reference", reason or "embeddings have no kernels")
    mica.fast.call_counts.clear()
    model(torch.tensor([[1, 5]])).sum().backward()
    ours = {"linear": 3, "linear_backward": 3, "embedding": 1, "embedding_backward": 1}
    kernels = {"linear_kernels": 3, "linear_backward_kernels": 3} if path == "kernel" else {}
    assert dict(mica.fast.call_counts) == ours | kernels


def test_kernels_that_cannot_be_had_are_an_error_where_they_are_demanded(monkeypatch):
    model = net(torch.float64)
    monkeypatch.setenv("MICA_BACKEND", "triton")
    embedding, *others = mica.fast.explain(model).rows
    assert {(row.path, row.reason) for row in others} == {("error", "no Triton kernels for float64")}
    assert (embedding.path, embedding.reason) == ("reference", "no Triton kernels for float64")
    with pytest.raises(RuntimeError, match="no Triton kernels for float64"):
        model(torch.tensor([[1, 5]]))
    monkeypatch.setenv("MICA_BACKEND", "auto")
    assert mica.fast.explain(model).counts() == {"reference": 4}


def test_other_adapters_are_named():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    (row,) = mica.fast.explain(model).rows
    assert (row.path, row.adapter, row.reason) == ("peft", "default", "adapter 'default' is not MiCA")
    conv = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1)), LoraConfig(target_modules=["0"]))
    assert "are not covered" in mica.fast.explain(conv).rows[0].reason


def test_off_is_said():
    model = net()
    with mica.fast.disabled():
        assert {row.reason for row in mica.fast.explain(model).rows} == {"mica.fast is disabled"}
    mica.fast.uninstall()
    try:
        assert {row.reason for row in mica.fast.explain(model).rows} == {"mica.fast is not installed"}
    finally:
        mica.fast.enable()


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_a_forward_behind_a_hook_of_accelerate_is_ours(kind):
    hooks = pytest.importorskip("accelerate.hooks")
    model = adapted(kind)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    before = mica.fast.call_counts["linear"], mica.fast.call_counts["up_projection"]
    quantised_logits(model)
    (row,) = [row for row in mica.fast.explain(model).rows if row.name.endswith("up_proj")]
    assert (row.path, row.calls) == ("reference", 1)
    assert (mica.fast.call_counts["linear"], mica.fast.call_counts["up_projection"]) != before


def test_a_forward_kept_from_before_the_import_is_seen():
    """accelerate's hooks put the old bound forward into the instance."""
    model = wrap(nn.Sequential(nn.Linear(4, 4)), rank=2, targets=["0"])
    layer = model.base_model.model[0]
    mica.fast.uninstall()
    layer._old_forward = layer.forward
    mica.fast.enable()
    layer.forward = functools.wraps(layer._old_forward)(lambda x: layer._old_forward(x))
    assert "before mica.fast" in mica.fast.explain(model).rows[0].reason
    before = mica.fast.call_counts["linear"]
    layer(torch.randn(2, 4))
    assert mica.fast.call_counts["linear"] == before


def test_equal_rows_are_one_line():
    model = wrap(tiny_llama(num_hidden_layers=30), targets="all-linear")
    explanation = mica.fast.explain(model)
    assert len(explanation.rows) == 210  # for programs, one row per layer
    lines = str(explanation).splitlines()
    assert len(lines) == 9
    assert lines[1].startswith("base_model.model.model.layers.{0-29}.self_attn.q_proj  ×30  Linear  default")
    assert lines[-1] == "210 layers: 210 reference"


def test_a_layer_that_differs_is_a_line_of_its_own():
    model = wrap(tiny_llama(num_hidden_layers=4), targets=["q_proj"])
    layers = model.base_model.model.model.layers
    layers[1].self_attn.q_proj.base_layer.weight.requires_grad_()
    layers[3].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    _, *lines, totals = str(mica.fast.explain(model)).splitlines()
    assert [re.match(r"\S*layers\.(\S*)\.self", line)[1] for line in lines] == ["{0,2}", "1", "3"]
    assert "base weight is trainable" in lines[1]
    assert totals == "4 layers: 3 reference, 1 peft"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["fc"], [("fc", 1)]),
        (["h.7.fc"], [("h.7.fc", 1)]),
        ([f"h.{n}.fc" for n in (0, 1, 3, 10, 11, 12)], [("h.{0-1,3,10-12}.fc", 6)]),
        ([f"h.{a}.e.{b}" for a, b in itertools.product(range(3), range(8))], [("h.{0-2}.e.{0-7}", 24)]),
        (["h.0.e.0", "h.1.e.1"], [("h.0.e.0", 1), ("h.1.e.1", 1)]),  # not h.{0-1}.e.{0-1}
        (["h.0.e.0", "h.0.e.1", "h.1.e.0", "h.1.e.1", "h.2.e.0"], [("h.{0-1}.e.{0-1}", 4), ("h.2.e.0", 1)]),
        (["h.0", "h.00", "h.1"], [("h.{0,00,1}", 3)]),
    ],
)
def test_a_pattern_stands_for_its_names_and_no_others(names, expected):
    assert Counter(patterns(names)) == Counter(expected)
