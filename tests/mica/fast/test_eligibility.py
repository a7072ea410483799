"""Every state that keeps a layer off the fast path: the reason is said, and the numbers are PEFT's own."""

import copy
import types

import pytest
import torch
from models import net, randomise
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

import mica.fast

X = torch.randn(3, 12)


def up(model):
    return model.base_model.model.up


def _dropout(model):
    up(model).lora_dropout["default"] = nn.Dropout(0.5)


def _merged(model):
    up(model).merge()


def _disabled(model):
    model.base_model.disable_adapter_layers()


def _two_adapters(model):
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])


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
    "exactly one active adapter is needed, active are ['default', 'second']": _two_adapters,
    "adapter 'default' is not MiCA": _not_mica,
    "lora_dropout > 0 in training": _dropout,
    "hooks on the base layer": _hook_on("base layer"),
    "hooks on the lora_A": _hook_on("lora_A"),
    "the base layer has a forward of its own": _own_forward,
    "a base layer of type Doubling": _subclass,
    "a base layer of type ParametrizedLinear": _weight_norm,
    "the base weight is trainable": _trainable("base weight"),
    "the base bias is trainable": _trainable("base bias"),
    "the lora_B is trainable": _trainable("lora_B"),
    "lora_bias=True": _lora_bias,
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


def test_dropout_in_evaluation_is_no_obstacle():
    model = randomise(net(targets=["up"]))
    _dropout(model)
    model.eval()
    assert mica.fast.explain(model).counts() == {"reference": 1}


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
