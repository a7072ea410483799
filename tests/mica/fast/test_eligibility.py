"""What keeps a layer on PEFT's path, or its base layer called: it is said, and the numbers are PEFT's own."""

import types

import pytest
import torch
from models import net, randomise
from tolerances import RELATIVE, error
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

import mica.fast

X = torch.randn(3, 12)


def up(model):
    return model.base_model.model.up


def _dropout(module):
    def change(model):
        up(model).lora_dropout["default"] = module

    return change


def _merged(model):
    up(model).merge()


def _disabled(model):
    model.base_model.disable_adapter_layers()


def _no_adapter(model):
    up(model).set_adapter("absent")


def _not_mica(model):
    up(model).lora_variant.clear()


def _hook_on(part):
    def change(model):
        module = {"base layer": up(model).base_layer, "lora_A": up(model).lora_A["default"]}[part]
        module.register_forward_hook(lambda module, args, out: out * 2)

    return change


def _own_forward(model):
    base = up(model).base_layer
    base.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) + 1, base)


def _subclass(model):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    up(model).base_layer.__class__ = Doubling


def _weight_norm(model):
    parametrizations.weight_norm(up(model).base_layer)


def _trainable(part):
    def change(model):
        layer = up(model)
        tensors = {
            "base weight": layer.base_layer.weight,
            "base bias": layer.base_layer.bias,
            "lora_B": layer.lora_B["default"].weight,
        }
        tensors[part].requires_grad_()

    return change


def _lora_bias(model):
    up(model).lora_B["default"].bias = nn.Parameter(torch.ones(20))


def _partitioned(model):
    up(model).base_layer.weight.ds_id = 0


CASES = {
    "adapters are disabled": _disabled,
    "the adapter is merged into the weight": _merged,
    "none of the active adapters ['absent'] is on this layer": _no_adapter,
    "adapter 'default' is not MiCA": _not_mica,
    "dropout of type AlphaDropout": _dropout(nn.AlphaDropout(0.5)),
    "lora_dropout of 1": _dropout(nn.Dropout(1.0)),
    "hooks on the lora_A": _hook_on("lora_A"),
    "the lora_B is trainable": _trainable("lora_B"),
    "lora_bias=True": _lora_bias,
}
CALLED = {
    "hooks on the base layer": _hook_on("base layer"),
    "the base layer has a forward of its own": _own_forward,
    "a base layer of type Doubling": _subclass,
    "a base layer of type ParametrizedLinear": _weight_norm,
    "the base weight is trainable": _trainable("base weight"),
    "the base bias is trainable": _trainable("base bias"),
    "the base weight is offloaded or partitioned": _partitioned,
}


def assert_peft_runs(model, x=X):
    before = mica.fast.call_counts.copy()
    torch.manual_seed(5)
    out = up(model)(x)
    assert mica.fast.call_counts == before
    torch.manual_seed(5)
    with mica.fast.disabled():
        assert torch.equal(out, up(model)(x))


@pytest.mark.parametrize("reason", CASES)
def test_layer_runs_on_peft_and_the_reason_is_said(reason):
    model = randomise(net(targets=["up"]))
    CASES[reason](model)
    (row,) = mica.fast.explain(model).rows
    assert row.path == "peft"
    assert row.reason.startswith(reason)
    assert_peft_runs(model)


@pytest.mark.parametrize("reason", CALLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_layer_is_called_and_the_adapter_is_ours(reason, dtype):
    model = randomise(net(dtype, targets=["up"]))
    CALLED[reason](model)
    (row,) = mica.fast.explain(model).rows
    assert row.path == "reference"
    assert f"base layer called: {reason}" in row.reason
    layer, x = up(model), X.to(dtype).requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def step():
        out = layer(x)
        return out, *torch.autograd.grad(out.float().square().sum(), [x, *trained])

    mica.fast.call_counts.clear()
    actual = step()
    for name in ("down_projection", "up_projection", "down_projection_backward", "up_projection_backward"):
        assert mica.fast.call_counts[name] == 1
    with mica.fast.disabled():
        expected = step()
    for ours, stock in zip(actual, expected, strict=True):
        assert ours.dtype == stock.dtype
        assert error(ours, stock) <= 3 * RELATIVE[dtype]


def test_global_hooks():
    model = randomise(net(targets=["up"]))
    handle = register_module_forward_hook(lambda module, args, out: None)
    try:
        assert mica.fast.explain(model).rows[0].reason == "global module hooks are registered"
        assert_peft_runs(model)
    finally:
        handle.remove()
    assert mica.fast.explain(model).counts() == {"reference": 1}


def test_input_cast_switched_off_is_peft_s_business():
    from peft.helpers import disable_input_dtype_casting

    model = randomise(net(torch.bfloat16, targets=["up"]))
    before = mica.fast.call_counts["linear"]
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        up(model)(X.bfloat16())
    assert mica.fast.call_counts["linear"] == before


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("max_norm", 1.0, "an embedding with max_norm"),
        ("sparse", True, "an embedding with scale_grad_by_freq or sparse gradients"),
        ("scale_grad_by_freq", True, "an embedding with scale_grad_by_freq or sparse gradients"),
    ],
)
def test_embeddings(attribute, value, reason):
    model = randomise(net(targets=["embed"]))
    setattr(model.base_model.model.embed.base_layer, attribute, value)
    (row,) = mica.fast.explain(model).rows
    assert (row.path, row.reason) == ("peft", reason)
    before = mica.fast.call_counts["embedding"]
    model.base_model.model.embed(torch.tensor([1, 2]))
    assert mica.fast.call_counts["embedding"] == before
