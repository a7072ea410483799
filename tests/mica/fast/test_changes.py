"""What may change between two calls of a layer: the next call sees it, and the one after its undoing too.

A layer is called once before anything changes, so that whatever a backend might keep of that call is there.
"""

import pytest
import torch
from torch import nn

import mica.fast
from tests.support.layer_changes import (
    CALLED,
    CHANGES_OF,
    FUSED,
    TWICE_BACK,
    TWICE_BEFORE,
    TWICE_BEFORE_BACK,
    X,
    changed,
    layer_of,
)
from tests.support.stock import as_graph, assert_same, counted
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.usefixtures("language")


@pytest.fixture
def layer(adapter):
    return layer_of(adapter=adapter)


def assert_runs(layer, operators, x=X, tolerance=3 * RELATIVE[torch.float32]):
    """These operators and no others, once each, with stock PEFT's output and gradients; those by kernels."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    x = x.detach().clone().requires_grad_()

    def step():
        out = layer(x)
        return out, *torch.autograd.grad(out.float().square().sum(), [x, *trained], allow_unused=True)

    torch.manual_seed(11)
    ours, counts = counted(step)
    kernels = {name: counts.pop(name) for name in list(counts) if name.endswith("_kernels")}
    backward = {"linear_backward": operators["linear"]} if operators else {}
    assert counts == operators | backward
    if operators and any(type(module) is nn.Dropout for module in layer.lora_dropout.values()):
        return kernels  # the masks are not PEFT's
    torch.manual_seed(11)
    with mica.fast.disabled():
        assert_same(ours, step(), tolerance if operators else 0.0)
    return kernels


@pytest.mark.parametrize(
    ("adapter", "name", "dtype"),
    [
        (adapter, name, dtype)
        for adapter, changes in CHANGES_OF.items()
        for name, (_, operators, _) in changes.items()
        for dtype in (torch.float32, torch.bfloat16)
        if dtype == torch.float32 or "linear_added" in operators
    ],
    indirect=["adapter"],
)
def test_the_next_call_sees_it_and_explain_says_it(adapter, name, dtype):
    change, operators, reason = CHANGES_OF[adapter][name]
    layer, x = layer_of(dtype, adapter), X.to(dtype)
    layer(x).sum().backward()
    undo = change(layer)
    try:
        assert_runs(layer, operators, x, 3 * RELATIVE[dtype])
        for row in mica.fast.explain(layer).rows:
            assert row.path == ("reference" if operators else "peft")
            said = row.reason.partition("base layer called: ")[2] if operators == CALLED else row.reason
            assert said.startswith(reason)
    finally:
        undo()
    assert_runs(layer, FUSED, x, 3 * RELATIVE[dtype])


@pytest.mark.parametrize("hook", [TWICE_BEFORE, TWICE_BACK, TWICE_BEFORE_BACK], ids=lambda hook: hook["kind"])
def test_hooks_on_the_layer_itself_run(layer, hook):
    register = getattr(layer, f"register_{hook['kind']}_hook")
    handle = register(hook["function"])
    assert_runs(layer, FUSED)
    handle.remove()
    assert_runs(layer, FUSED)


@pytest.mark.parametrize("part", ["base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"])
def test_one_weight_of_another_dtype_is_peft_s_error(layer, part):
    assert_runs(layer, FUSED)
    undo = changed(f"{part}.data", torch.Tensor.bfloat16)(layer)
    mica.fast.call_counts.clear()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(X)
    assert not mica.fast.call_counts
    undo()
    assert_runs(layer, FUSED)


@pytest.mark.parametrize("p", [-0.5, 1.5, float("nan")])
def test_a_dropout_of_no_probability_is_pytorch_s_error(p):
    layer = layer_of(lora_dropout=0.5)
    layer.lora_dropout["default"].p = p
    mica.fast.call_counts.clear()
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match="dropout probability has to be between 0 and 1"):
            layer(X)
        layer.eval()
    assert not mica.fast.call_counts
    (row,) = mica.fast.explain(layer).rows
    assert (row.path, row.reason) == ("peft", f"lora_dropout of {p}")


def test_dropout_follows_train_and_eval(adapter):
    layer = layer_of(adapter=adapter, lora_dropout=0.5)
    assert not torch.equal(layer(X), layer(X))
    without_dropout = layer.eval()(X)
    assert torch.equal(without_dropout, layer(X))
    layer.lora_dropout["default"].train()
    assert not torch.equal(without_dropout, layer(X))


def test_dtypes_autocast_and_settings(layer):
    """The layer's own dtype, the activations', autocast, and the dtype of the low-rank products."""
    loose, narrow = 3 * RELATIVE[torch.bfloat16], X.bfloat16().repeat(4, 1, 1)  # few tokens run in fp32
    assert_runs(layer, FUSED)
    with torch.autocast("cpu", torch.bfloat16):
        assert_runs(layer, FUSED, tolerance=loose)
        assert layer(X).dtype == torch.bfloat16
    assert layer(X).dtype == torch.float32
    layer.bfloat16()
    assert_runs(layer, FUSED, narrow, loose)
    for part in (layer.lora_A, layer.lora_B):
        part.float()
    assert_runs(layer, FUSED, narrow, loose)
    coarse = layer(narrow)
    mica.fast.enable(compute_dtype=torch.float32)
    assert_runs(layer, FUSED, narrow, loose)
    assert not torch.equal(layer(narrow), coarse)
    mica.fast.enable(compute_dtype=None)
    layer.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError, match="dtype"):  # PEFT's own
        layer(narrow)
    layer.cast_input_dtype_enabled = True
    layer.float()
    assert_runs(layer, FUSED)


def test_autocast_s_dtype_goes_before_the_setting_s(adapter):
    layer, narrow = layer_of(torch.bfloat16, adapter), X.bfloat16().repeat(8, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(narrow)
        mica.fast.enable(compute_dtype=torch.float32)
        assert torch.equal(layer(narrow), expected)
    assert not torch.equal(layer(narrow), expected)


def test_the_backend_s_variable(layer, monkeypatch):
    assert not assert_runs(layer, FUSED)
    monkeypatch.setenv("MICA_BACKEND", "triton")
    assert assert_runs(layer, FUSED) == {"linear_kernels": 1, "linear_backward_kernels": 1}
    monkeypatch.setenv("MICA_BACKEND", "reference")
    assert not assert_runs(layer, FUSED)
    monkeypatch.setenv("MICA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="MICA_BACKEND"):
        layer(X)


def test_another_device(layer):
    assert_runs(layer, FUSED)
    layer.to("meta")
    mica.fast.call_counts.clear()
    assert layer(X.to("meta")).device.type == "meta"
    assert not mica.fast.call_counts


@pytest.mark.parametrize("adapter", ["LoRA"], indirect=True)
def test_compiled_between_eager_calls(layer):
    expected = layer(X)
    compiled = as_graph(layer)
    assert error(compiled(X), expected) <= RELATIVE[torch.float32]
    layer.scaling["default"] = 0.125
    again = layer(X)
    assert not torch.equal(again, expected)
    assert error(compiled(X), again) <= RELATIVE[torch.float32]
    assert_runs(layer, FUSED)
