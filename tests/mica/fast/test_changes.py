"""What may change between two calls of a layer: the next call sees it, and the one after its undoing too.

A layer is called once before anything changes, so that whatever a backend might keep of that call is there.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import mica.fast
from tests.support.layer_changes import CHANGES, FUSED, PEFT, add, rounded
from tests.support.models import adapted_layers, net, randomise
from tests.support.tolerances import RELATIVE, error


@pytest.fixture
def layer():
    model = randomise(net(targets=["up"]))
    add.config = model.peft_config["default"]
    (layer,) = adapted_layers(model).values()
    return layer


X = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))


def assert_runs(layer, operators, x=X, tolerance=3 * RELATIVE[torch.float32]):
    """These operators and no others, once each, with stock PEFT's output and gradients."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    x = x.detach().clone().requires_grad_()

    def step():
        torch.manual_seed(11)
        out = layer(x)
        return out, *torch.autograd.grad(out.float().square().sum(), [x, *trained], allow_unused=True)

    mica.fast.call_counts.clear()
    actual = step()
    forward = {
        name: count
        for name, count in mica.fast.call_counts.items()
        if count and name in ("linear", "down_projection", "up_projection")
    }
    assert forward == operators
    with mica.fast.disabled():
        expected = step()
    masked = any(type(module) is nn.Dropout for module in layer.lora_dropout.values()) and operators
    for ours, stock in zip(actual, expected, strict=True):
        assert (ours is None) == (stock is None)
        if ours is not None and not masked:  # the masks are not PEFT's
            assert ours.dtype == stock.dtype
            assert error(ours, stock) <= tolerance


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_call_sees_it(layer, name):
    change, operators = CHANGES[name]
    assert_runs(layer, FUSED)
    undo = change(layer)
    try:
        assert_runs(layer, operators)
    finally:
        undo()
    assert_runs(layer, FUSED)


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_one_weight_of_another_dtype_is_peft_s_error(layer, part):
    assert_runs(layer, FUSED)
    undo = rounded(part)(layer)
    mica.fast.call_counts.clear()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(X)
    assert not mica.fast.call_counts
    undo()
    assert_runs(layer, FUSED)


def test_dropout_follows_train_and_eval():
    model = randomise(net(targets=["up"], lora_dropout=0.5))
    (layer,) = adapted_layers(model).values()
    assert not torch.equal(layer(X), layer(X))
    layer.eval()
    without_dropout = layer(X)
    assert torch.equal(without_dropout, layer(X))
    layer.lora_dropout["default"].train()
    assert not torch.equal(without_dropout, layer(X))


def test_a_global_hook(layer):
    assert_runs(layer, FUSED)
    handle = register_module_forward_hook(lambda module, args, out: None)
    try:
        assert_runs(layer, PEFT)
    finally:
        handle.remove()
    assert_runs(layer, FUSED)


@contextmanager
def _enabled(**settings):
    mica.fast.enable(**settings)
    try:
        yield
    finally:
        mica.fast.enable()


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
    with _enabled(compute_dtype=torch.float32):
        assert_runs(layer, FUSED, narrow, loose)
        assert not torch.equal(layer(narrow), coarse)
    layer.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError, match="dtype"):  # PEFT's own
        layer(narrow)
    layer.cast_input_dtype_enabled = True
    layer.float()
    assert_runs(layer, FUSED)


def test_switched_off_and_on(layer):
    assert_runs(layer, FUSED)
    with mica.fast.disabled():
        assert_runs(layer, PEFT)
    mica.fast.disable()
    try:
        assert_runs(layer, PEFT)
    finally:
        mica.fast.enable()
    assert_runs(layer, FUSED)


def test_the_backend_s_variable(layer, monkeypatch):
    assert_runs(layer, FUSED)
    assert not mica.fast.call_counts["linear_kernels"]
    monkeypatch.setenv("MICA_BACKEND", "triton")
    assert_runs(layer, FUSED)
    assert mica.fast.call_counts["linear_kernels"] == 1
    monkeypatch.setenv("MICA_BACKEND", "reference")
    assert_runs(layer, FUSED)
    assert not mica.fast.call_counts["linear_kernels"]
    monkeypatch.setenv("MICA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="MICA_BACKEND"):
        layer(X)


def test_another_device(layer):
    assert_runs(layer, FUSED)
    layer.to("meta")
    mica.fast.call_counts.clear()
    assert layer(X.to("meta")).device.type == "meta"
    assert not mica.fast.call_counts


def test_compiled_between_eager_calls(layer):
    torch.compiler.reset()
    expected = layer(X)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert error(compiled(X), expected) <= RELATIVE[torch.float32]
    layer.scaling["default"] = 0.125
    again = layer(X)
    assert not torch.equal(again, expected)
    assert error(compiled(X), again) <= RELATIVE[torch.float32]
    assert_runs(layer, FUSED)
