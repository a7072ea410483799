"""What may change about a layer between two of its calls, and the operators that run then."""

import types

import torch
from torch import nn

FUSED, CALLED, PEFT = {"linear": 1}, {"down_projection": 1, "up_projection": 1}, {}


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


def _for_all(owner, name):
    """As profilers and emulators of other arithmetic replace a function."""

    def change(layer):
        held, stock = vars(owner).get(name), getattr(owner, name)
        setattr(owner, name, lambda *args: 2 * stock(*args))
        return lambda: setattr(owner, name, held) if held else delattr(owner, name)

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
    add(layer, "second")
    layer.set_adapter("second")

    def undo():
        layer.set_adapter("default")
        layer.delete_adapter("second")

    return undo


def _two_adapters(layer):
    add(layer, "second")
    layer.set_adapter(["default", "second"])

    def undo():
        layer.delete_adapter("second")
        layer.set_adapter("default")

    return undo


def add(layer, name):
    config = add.config
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


def rounded(part):
    """Adapter weights of two dtypes: an error of PEFT's."""

    def change(layer):
        weight = _part(layer, part).weight
        before = weight.data
        weight.data = before.bfloat16()
        return lambda: setattr(weight, "data", before)

    return change


CHANGES = {
    # name: (change of the layer, which gives its undoing; the operators that run then)
    "a hook on the base": (_hook("base_layer"), CALLED),
    "a hook on lora_A": (_hook("lora_A"), PEFT),
    "a hook on lora_B": (_hook("lora_B"), PEFT),
    "a hook on lora_dropout": (_hook("lora_dropout"), PEFT),
    "a hook before the base": (_hook_before("base_layer"), CALLED),
    "a hook before lora_B": (_hook_before("lora_B"), PEFT),
    "a hook before its backward": (_hook_before_backward("base_layer"), CALLED),
    "a backward hook on the base": (_backward_hook("base_layer"), CALLED),
    "a backward hook on lora_A": (_backward_hook("lora_A"), PEFT),
    "a forward of the base's own": (_own_forward("base_layer"), CALLED),
    "a forward of lora_A's own": (_own_forward("lora_A"), PEFT),
    "a forward of lora_B's own": (_own_forward("lora_B"), PEFT),
    "a forward of lora_dropout's own": (_own_forward("lora_dropout"), PEFT),
    "another nn.Linear.forward": (_for_all(nn.Linear, "forward"), PEFT),
    "another nn.Identity.forward": (_for_all(nn.Identity, "forward"), PEFT),
    "another nn.Linear.__call__": (_for_all(nn.Linear, "__call__"), PEFT),
    "another nn.Identity.__call__": (_for_all(nn.Identity, "__call__"), PEFT),
    "another nn.Module.__call__": (_for_all(nn.Module, "__call__"), PEFT),
    "another functional.linear": (_for_all(nn.functional, "linear"), PEFT),
    "a base weight that is trained": (_trained("base_layer"), CALLED),
    "a base bias that is trained": (_trained("base_layer", "bias"), CALLED),
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
    "two adapters": (_two_adapters, {"linear": 1, **CALLED}),
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
        CALLED,
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
    "a partitioned base": (_partitioned("base_layer"), CALLED),
    "a partitioned lora_A": (_partitioned("lora_A"), PEFT),
    "a partitioned lora_B": (_partitioned("lora_B"), PEFT),
    "tensor parallelism": (lambda layer: _set(layer, "_tp_info", object()), PEFT),
    "tensor parallelism of the base": (lambda layer: _set(layer.base_layer, "_hf_tp_plan", "colwise"), PEFT),
}


def _set(owner, name, value):
    setattr(owner, name, value)
    return lambda: delattr(owner, name)
