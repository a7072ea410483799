"""What may change between two calls of a layer: the next call sees it, and the one after its undoing too.

A layer is called once before anything changes, so that whatever a backend might keep of that call is there.
"""

import types
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import mica.fast
from tests.support.models import adapted_layers, net, randomise
from tests.support.tolerances import RELATIVE, error

FUSED, BESIDE, PEFT = {"linear": 1}, {"down_projection": 1, "up_projection": 1}, {}


def _attribute(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _entry(table, key, value):
    before = table[key]
    table[key] = value

    def undo():
        table[key] = before

    return undo


def _hook(part):
    def change(layer):
        return _part(layer, part).register_forward_hook(lambda module, args, out: out * 2).remove

    return change


def _hook_before(part):
    def change(layer):
        return _part(layer, part).register_forward_pre_hook(lambda module, args: (args[0] * 2,)).remove

    return change


def _backward_hook(part):
    def change(layer):
        hook = _part(layer, part).register_full_backward_hook(lambda module, grads, out: (grads[0] * 2,))
        return hook.remove

    return change


def _hook_before_backward(part):
    def change(layer):
        return (
            _part(layer, part).register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,)).remove
        )

    return change


def _own_forward(part):
    def change(layer):
        module = _part(layer, part)
        module.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2, module)
        return lambda: delattr(module, "forward")

    return change


def _class_forward(kind):
    def change(layer):
        stock = kind.forward
        kind.forward = lambda self, x: 2 * stock(self, x)
        return lambda: setattr(kind, "forward", stock)

    return change


def _part(layer, part):
    return layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]


def _trained(part, name="weight"):
    def change(layer):
        tensor = getattr(_part(layer, part), name)
        tensor.requires_grad_()
        return lambda: tensor.requires_grad_(False)

    return change


def _frozen(layer):
    weight = layer.lora_A["default"].weight
    weight.requires_grad_(False)
    return weight.requires_grad_


def _values(part):
    """Other numbers through ``.data``, in other memory: the tensor is the same object."""

    def change(layer):
        weight = _part(layer, part).weight
        before = weight.data
        weight.data = before * 3
        return lambda: setattr(weight, "data", before)

    return change


def _other_parameter(part):
    def change(layer):
        module = _part(layer, part)
        before = module.weight
        module.weight = nn.Parameter(before.detach() * 3, requires_grad=before.requires_grad)
        return lambda: setattr(module, "weight", before)

    return change


def _merged(layer):
    layer.merge()
    return layer.unmerge


def _disabled(layer):
    layer.enable_adapters(False)
    return lambda: layer.enable_adapters(True)


def _second_adapter(layer):
    _add(layer, "second")
    layer.set_adapter("second")

    def undo():
        layer.set_adapter("default")
        layer.delete_adapter("second")

    return undo


def _two_adapters(layer):
    _add(layer, "second")
    layer.set_adapter(["default", "second"])

    def undo():
        layer.delete_adapter("second")
        layer.set_adapter("default")

    return undo


def _add(layer, name):
    config = _add.config
    layer.update_layer(name, r=3, lora_alpha=5, config=config)
    with torch.no_grad():
        layer.lora_A[name].weight.normal_(generator=torch.Generator().manual_seed(3))
    layer.lora_B[name].weight.requires_grad_(False)


def _activated(layer, names):
    layer.set_adapter(names)
    return lambda: layer.set_adapter("default")


def _without_bias(layer):
    return _attribute(layer.base_layer, "bias", None)


def _without_variant(layer):
    variant = layer.lora_variant.pop("default")
    return lambda: layer.lora_variant.update(default=variant)


def _partitioned(part):
    def change(layer):
        weight = _part(layer, part).weight
        weight.ds_id = 0
        return lambda: delattr(weight, "ds_id")

    return change


def _rounded(part):
    """Adapter weights of two dtypes: an error of PEFT's."""

    def change(layer):
        weight = _part(layer, part).weight
        before = weight.data
        weight.data = before.bfloat16()
        return lambda: setattr(weight, "data", before)

    return change


CHANGES = {
    # name: (change of the layer, which gives its undoing; the operators that run then)
    "a hook on the base": (_hook("base_layer"), BESIDE),
    "a hook on lora_A": (_hook("lora_A"), PEFT),
    "a hook on lora_B": (_hook("lora_B"), PEFT),
    "a hook on lora_dropout": (_hook("lora_dropout"), PEFT),
    "a hook before the base": (_hook_before("base_layer"), BESIDE),
    "a hook before lora_B": (_hook_before("lora_B"), PEFT),
    "a hook before its backward": (_hook_before_backward("base_layer"), BESIDE),
    "a backward hook on the base": (_backward_hook("base_layer"), BESIDE),
    "a backward hook on lora_A": (_backward_hook("lora_A"), PEFT),
    "a forward of the base's own": (_own_forward("base_layer"), BESIDE),
    "a forward of lora_A's own": (_own_forward("lora_A"), PEFT),
    "a forward of lora_B's own": (_own_forward("lora_B"), PEFT),
    "a forward of lora_dropout's own": (_own_forward("lora_dropout"), PEFT),
    "another nn.Linear.forward": (_class_forward(nn.Linear), PEFT),
    "another nn.Identity.forward": (_class_forward(nn.Identity), PEFT),
    "a base weight that is trained": (_trained("base_layer"), BESIDE),
    "a base bias that is trained": (_trained("base_layer", "bias"), BESIDE),
    "a lora_B that is trained": (_trained("lora_B"), PEFT),
    "a lora_A that is not": (_frozen, FUSED),
    "other numbers in the base": (_values("base_layer"), FUSED),
    "other numbers in lora_A": (_values("lora_A"), FUSED),
    "other numbers in lora_B": (_values("lora_B"), FUSED),
    "another base weight": (_other_parameter("base_layer"), FUSED),
    "another lora_A": (_other_parameter("lora_A"), FUSED),
    "another lora_B": (_other_parameter("lora_B"), FUSED),
    "merged": (_merged, PEFT),
    "disabled": (_disabled, PEFT),
    "another adapter": (_second_adapter, FUSED),
    "two adapters": (_two_adapters, {"linear": 1, **BESIDE}),
    "a list of one adapter": (lambda layer: _activated(layer, ["default"]), FUSED),
    "no adapter": (lambda layer: _activated(layer, "absent"), PEFT),
    "another scaling": (lambda layer: _entry(layer.scaling, "default", 0.25), FUSED),
    "a scaling that is a tensor": (lambda layer: _entry(layer.scaling, "default", torch.tensor(0.5)), FUSED),
    "dropout": (lambda layer: _entry(layer.lora_dropout, "default", nn.Dropout(0.5)), FUSED),
    "another kind of dropout": (
        lambda layer: _entry(layer.lora_dropout, "default", nn.AlphaDropout(0.5)),
        PEFT,
    ),
    "no variant": (_without_variant, PEFT),
    "another kind of base": (
        lambda layer: _attribute(layer.base_layer, "__class__", type("Other", (nn.Linear,), {})),
        BESIDE,
    ),
    "another kind of layer": (
        lambda layer: _attribute(layer, "__class__", type("Other", (type(layer),), {})),
        PEFT,
    ),
    "no bias": (_without_bias, FUSED),
    "a bias on lora_A": (
        lambda layer: _attribute(layer.lora_A["default"], "bias", nn.Parameter(torch.ones(4))),
        PEFT,
    ),
    "a bias on lora_B": (
        lambda layer: _attribute(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(20))),
        PEFT,
    ),
    "a partitioned base": (_partitioned("base_layer"), BESIDE),
    "a partitioned lora_A": (_partitioned("lora_A"), PEFT),
    "a partitioned lora_B": (_partitioned("lora_B"), PEFT),
    "tensor parallelism": (lambda layer: _set(layer, "_tp_info", object()), PEFT),
    "tensor parallelism of the base": (lambda layer: _set(layer.base_layer, "_hf_tp_plan", "colwise"), PEFT),
}


def _set(owner, name, value):
    setattr(owner, name, value)
    return lambda: delattr(owner, name)


@pytest.fixture
def layer():
    model = randomise(net(targets=["up"]))
    _add.config = model.peft_config["default"]
    (found,) = adapted_layers(model).values()
    return found


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
    undo = _rounded(part)(layer)
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
