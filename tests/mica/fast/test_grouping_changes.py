"""What changes between the calls of a group's layers: a follower's result is that of its present state."""

import contextlib

import pytest
import torch
from peft import LoraConfig
from torch import nn

import mica.fast
from mica.fast import grouping
from tests.support.grouped import X, assert_equal, learned
from tests.support.models import gradients, randomise

pytestmark = pytest.mark.usefixtures("grouping_on")


def result(model, change, x=None):
    """Outputs of a, and of b and c after ``change(layer b, x)``, which may return a context; gradients."""
    net = model.base_model.model
    model.zero_grad(set_to_none=True)
    x = X.clone().requires_grad_() if x is None else x
    first = net.a(x)
    with change(net.b, x) or contextlib.nullcontext():
        outputs = [net.b(x), net.c(x)]
    assert all(out.dtype == outputs[0].dtype for out in outputs)
    out = torch.cat([first.float(), *(out.float() for out in outputs)])
    out.square().sum().backward()
    grouping.forget_pending()
    return (out.detach(), gradients(model)), [out.dtype for out in outputs]


def held_against_stock(change, prepare=lambda model: None, x=lambda: None, tolerance=1e-5, led=1):
    """Twice the same model, the change in its middle: with groups, and on stock PEFT."""
    results = []
    for stock in (False, True):
        model = learned()
        prepare(model)
        if stock:
            with mica.fast.disabled():
                results.append(result(model, change, x()))
        else:
            results.append(result(model, change, x()))
            assert mica.fast.call_counts["linear_group"] == led
    (ours, dtypes), (theirs, expected) = results
    assert dtypes == expected
    assert_equal(ours, theirs, tolerance)


def test_nothing():
    held_against_stock(lambda layer, x: None)
    assert mica.fast.call_counts["linear"] == 0


@pytest.mark.parametrize("around", [False, True])
def test_autocast(around):
    """A router that computes in fp32 within an autocast model, and the other way round."""

    def change(layer, x):
        return torch.autocast("cpu", torch.bfloat16, enabled=not around)

    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        held_against_stock(change, tolerance=2e-2)


def _in_place(part):
    def change(layer, x):
        with torch.no_grad():
            part(layer).add_(0.5)

    return change


def _data(part):
    def change(layer, x):
        part(layer).data = part(layer).data + 0.5

    return change


def _replaced(part):
    def change(layer, x):
        old = part(layer)
        new = nn.Parameter(old.detach() + 0.5, old.requires_grad)
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[name] = new

    return change


PARTS = {
    "lora_A": lambda layer: layer.lora_A["default"].weight,
    "lora_B": lambda layer: layer.lora_B["default"].weight,
    "weight": lambda layer: layer.base_layer.weight,
    "bias": lambda layer: layer.base_layer.bias,
}


@pytest.mark.parametrize("how", [_in_place, _data, _replaced])
@pytest.mark.parametrize("part", PARTS)
def test_weights(part, how):
    held_against_stock(how(PARTS[part]))


def test_another_adapter():
    def add(model):
        config = LoraConfig(r=2, lora_alpha=8, init_lora_weights="mica", target_modules=["a", "b", "c"])
        model.add_adapter("other", config)
        randomise(model)
        model.set_adapter("default")

    held_against_stock(lambda layer, x: layer.set_adapter("other"), add)


def test_scaling():
    held_against_stock(lambda layer, x: layer.set_scale("default", 3.0))
    held_against_stock(lambda layer, x: layer.scale_layer(3.0))


def test_a_tensor_scaling_that_is_filled():
    def prepare(model):
        layer = model.base_model.model.b
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])

    def change(layer, x):
        layer.scaling["default"].fill_(3.0)

    held_against_stock(change, prepare)


def test_disabled_and_merged_adapters():
    held_against_stock(lambda layer, x: layer.enable_adapters(False))
    held_against_stock(lambda layer, x: layer.merge())


def test_dropout():
    """Its mask is another than stock's; but it is drawn."""
    model = learned()
    x = X.clone().requires_grad_()

    def change(layer, x):
        layer.lora_dropout["default"] = nn.Dropout(0.9)

    (out, _), _ = result(model, change, x)
    whole = model.base_model.model.b(x)
    assert not torch.equal(out[4:8], whole)
    layer = model.base_model.model.b
    assert torch.allclose(out[:4], model.base_model.model.a(x))
    assert not torch.allclose(out[4:8], layer.eval()(x))


def test_x_that_begins_to_require_a_gradient():
    leaves = []

    def leaf():
        leaves.append(X.clone())
        return leaves[-1]

    def change(layer, x):
        x.requires_grad_()

    held_against_stock(change, x=leaf)
    ours, theirs = (x.grad for x in leaves)
    torch.testing.assert_close(ours, theirs)


def test_another_view_of_x():
    """Of the same memory and version."""
    model = learned()
    net = model.base_model.model
    x = torch.randn(6, 6).requires_grad_()
    net.a(x)
    actual = net.b(x.t())
    grouping.forget_pending()
    with mica.fast.disabled():
        torch.testing.assert_close(actual, net.b(x.t()))
    assert mica.fast.call_counts["linear_group"] == 1


def test_settings():
    """fp32 adapters over a bf16 base: in bf16 as the activations are, or in fp32 as stock's."""
    expected = {}
    for grouped in (False, True):
        mica.fast.enable(group_projections=True)
        model = learned()
        model.base_model.model.to(torch.bfloat16)
        for module in model.modules():
            if isinstance(module, nn.ModuleDict):
                module.float()
        mica.fast.enable(group_projections=grouped)

        def change(layer, x, grouped=grouped):
            mica.fast.enable(compute_dtype=torch.float32, group_projections=grouped)

        actual, _ = result(model, change, X.bfloat16().requires_grad_())
        expected[grouped] = actual
    assert mica.fast.call_counts["linear_group"] == 1
    for ours, alone in zip(expected[True][0][4:], expected[False][0][4:], strict=True):
        assert torch.equal(ours, alone)


def test_weights_of_a_layer_that_is_not_called_after_all():
    """Other steps of an optimizer may come between a forward and its backward."""
    model = learned()
    net = model.base_model.model
    x = X.clone().requires_grad_()
    out = net.a(x)
    with torch.no_grad():
        net.b.lora_A["default"].weight.add_(0.5)
        net.c.base_layer.weight.add_(0.5)
    out.sum().backward()
    assert mica.fast.call_counts["linear_group"] == 1


def test_base_weights_made_in_inference_mode():
    def prepare(model):
        for layer in (model.base_model.model.a, model.base_model.model.b, model.base_model.model.c):
            with torch.inference_mode():
                weight = layer.base_layer.weight.clone()
            layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
            assert layer.base_layer.weight.is_inference()

    held_against_stock(lambda layer, x: None, prepare, x=lambda: X.clone())


def test_disabled_in_the_middle():
    held_against_stock(lambda layer, x: mica.fast.disabled())


def test_another_stream(monkeypatch):
    """What the leader's stream computes may not be there when another stream, that waited for x, reads it."""
    model = learned()
    surroundings, stream = grouping.surroundings, [0]
    monkeypatch.setattr(grouping, "surroundings", lambda x: (*surroundings(x), stream[0]))

    def change(layer, x):
        stream[0] = 1

    result(model, change)
    assert mica.fast.call_counts["linear"] == 2


def test_a_frozen_adapter_stays_without_a_gradient():
    model = learned()
    net = model.base_model.model
    net.b.lora_A["default"].weight.requires_grad_(False)
    x = X.clone()
    outputs = [layer(x) for layer in (net.a, net.b, net.c)]
    assert [out.requires_grad for out in outputs] == [True, False, True]
