"""What keeps a layer on PEFT's path, or its base layer called: it is said, and the numbers are PEFT's own."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.pytorch_utils import Conv1D

import mica.fast
from mica.fast.forward import decide as calls
from tests.support.layer_changes import INPUTS, add, layer_of
from tests.support.models import net, randomise
from tests.support.stock import as_graph, as_stock, assert_same, both, counted
from tests.support.tolerances import RELATIVE, error

X, INDICES = torch.randn(3, 12), torch.tensor([1, 2])


def said_of(model):
    (row,) = mica.fast.explain(model).rows
    return row.path, row.reason


def assert_peft_runs(layer, x):
    out, counts = counted(lambda: as_stock(lambda: layer(x), 0.0))
    assert not counts
    return out


def test_a_dropout_s_forward_that_is_replaced_for_all_modules_runs(monkeypatch):
    layer = layer_of(lora_dropout=0.5)
    expected, stock = layer(X), nn.Dropout.forward
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: 2 * stock(self, x))
    assert said_of(layer) == ("peft", "Dropout.forward has been monkey-patched")
    assert_peft_runs(layer, X)
    monkeypatch.undo()
    assert not torch.equal(layer(X), expected)  # another mask
    assert mica.fast.explain(layer).counts() == {"reference": 1}


def test_dropout_is_off_in_eval_mode_where_the_quick_check_does_not_apply():
    layer = layer_of(lora_dropout=0.5)
    add(layer, "second")
    layer.set_adapter(["default", "second"])
    layer.eval()
    assert mica.fast.explain(layer).counts() == {"reference": 1}
    as_stock(lambda: layer(X), RELATIVE[torch.float32])


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_factors_of_another_class_are_peft_s(part):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = layer_of()
    getattr(layer, part)["default"].__class__ = Doubled
    assert said_of(layer) == ("peft", "the adapter's modules are not plain nn.Linear")
    assert_peft_runs(layer, X)


def test_a_replaced_forward_of_conv1d_has_the_base_layer_called(monkeypatch):
    model = randomise(net(targets=["conv"]))
    stock, x = Conv1D.forward, torch.randn(3, 20)
    monkeypatch.setattr(Conv1D, "forward", lambda self, x: 2 * stock(self, x))
    assert "base layer called: Conv1D.forward has been monkey-patched" in said_of(model)[1]
    as_stock(lambda: model.base_model.model.conv(x), RELATIVE[torch.float32])


@pytest.mark.parametrize(
    ("owner", "name"), [(nn.Module, "__call__"), (nn.Linear, "__call__"), (nn.functional, "linear")]
)
def test_a_call_that_is_replaced_for_all_modules_runs_in_a_graph_from_before(monkeypatch, owner, name):
    layer = layer_of()
    compiled = as_graph(layer)
    expected = compiled(X)
    stock = getattr(owner, name)

    def twice(*args):
        result = stock(*args)
        # From PyTorch 2.14 on the graph is called as a module, too, and returns a tuple
        return 2 * result if isinstance(result, torch.Tensor) else result

    monkeypatch.setattr(owner, name, twice, raising=False)
    with mica.fast.disabled():
        doubled = layer(X)
    assert error(compiled(X), doubled) <= RELATIVE[torch.float32]
    monkeypatch.undo()
    assert torch.equal(compiled(X), expected)
    assert mica.fast.explain(layer).counts() == {"reference": 1}


def test_fx_s_own_call_while_it_traces_is_no_reason():
    layer = layer_of()
    graph = make_fx(layer)(X)
    assert "mica.linear" in graph.code
    assert error(graph(X), layer(X)) <= RELATIVE[torch.float32]


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR)")
def test_inputs_that_are_not_plain_are_peft_s(kind):
    layer, x = layer_of(), INPUTS[kind](X)
    (out, expected), counts = counted(lambda: both(lambda: layer(x)))
    assert not counts
    assert out.layout == expected.layout
    assert_same(*map(_dense_parts, (out, expected)), 0.0)


def _dense_parts(out):
    return out.unbind() if out.is_nested else [out if out.layout == torch.strided else out.to_dense()]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_runs_without_this_package():
    """And so does what torch.onnx exports by tracing."""
    model = randomise(net())
    indices = torch.tensor([[1, 2, 3], [0, 7, 7]])
    traced = torch.jit.trace(model, indices)
    assert "mica::" not in str(traced.inlined_graph)
    before = mica.fast.call_counts["linear"]
    assert error(traced(indices), model(indices)) <= 3 * RELATIVE[torch.float32]
    assert mica.fast.call_counts["linear"] == before + 3  # the model's own, after tracing


@pytest.mark.parametrize("threads", [1, 2])
def test_adapters_made_in_inference_mode(monkeypatch, threads):
    """With two threads the solver's results come from threads that are not in that mode."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.inference_mode():
        model = randomise(net(targets=["embed", "up"]))
        assert mica.fast.explain(model).counts() == {"reference": 2}
        expected = model(INDICES)
    rows = mica.fast.explain(model).rows
    assert [row.reason for row in rows] == ["the lora_A was made in inference mode"] * 2
    assert error(model(INDICES), expected) <= RELATIVE[torch.float32]


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("max_norm", "an embedding with max_norm"),
        ("sparse", "an embedding with scale_grad_by_freq or sparse gradients"),
        ("scale_grad_by_freq", "an embedding with scale_grad_by_freq or sparse gradients"),
    ],
)
def test_embeddings(attribute, reason):
    model = randomise(net(targets=["embed"]))
    setattr(model.base_model.model.embed.base_layer, attribute, 1.0 if attribute == "max_norm" else True)
    assert said_of(model) == ("peft", reason)
    assert_peft_runs(model.base_model.model.embed, INDICES)


@pytest.mark.parametrize(("target", "x"), [("up", X), ("embed", INDICES)])
def test_autocast_on_a_device_without_rules_is_left_to_peft(target, x, monkeypatch):
    monkeypatch.setattr(calls, "AUTOCAST", ("cuda",))
    model = randomise(net(targets=[target]))
    layer = getattr(model.base_model.model, target)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = calls.decide(layer, x)
        assert (getattr(found, "reason", None) == "autocast on cpu") == enabled
