"""What may change about a layer between two of its calls: the operators that run then, and what is said."""

import functools
import inspect
import operator

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

FUSED, CALLED, PEFT = {"linear": 1}, {"down_projection": 1, "up_projection": 1}, {}


def _hook(part, kind="forward", function=lambda module, args, out: out * 2):
    def change(layer):
        return getattr(operator.attrgetter(part)(layer), f"register_{kind}_hook")(function).remove

    return change


def changed(path, value):
    """``value(what was there)`` as the attribute to which the path leads from a layer or module."""
    *way, name = path.split(".")

    def change(layer):
        owner = functools.reduce(getattr, way, layer)
        before = getattr(owner, name, None)
        was_there = hasattr(owner, name) and not inspect.ismethod(before)
        setattr(owner, name, value(before))
        return lambda: setattr(owner, name, before) if was_there else delattr(owner, name)

    return change


def _doubled(before):
    return lambda x: 2 * before(x)


def _subclass(kind):
    return type("Other", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


def _renamed(kind):
    return type("Other", (kind,), {})


def _entry(table, value):
    def change(layer):
        held = getattr(layer, table)
        before, held["default"] = held["default"], value
        return lambda: operator.setitem(held, "default", before)

    return change


def for_all(owner, name):
    """As profilers and emulators of other arithmetic replace a function."""

    def change(layer):
        held, stock = vars(owner).get(name), getattr(owner, name)
        setattr(owner, name, lambda *args: 2 * stock(*args))
        return lambda: setattr(owner, name, held) if held else delattr(owner, name)

    return change


def _trained(path):
    return changed(f"{path}.requires_grad", lambda before: True)


def _tripled(path):
    """Other numbers through ``.data``, in other memory: the tensor is the same object."""
    return changed(f"{path}.data", lambda before: before * 3)


def _other_parameter(path):
    return changed(path, lambda before: nn.Parameter(before.detach() * 3, before.requires_grad))


def _sparse(before):
    return nn.Parameter(before.detach().to_sparse())


def _biased(path, size):
    return changed(f"{path}.bias", lambda before: nn.Parameter(torch.ones(size)))


def _partitioned(path):
    return changed(f"{path}.ds_id", lambda before: 0)


def rounded(path):
    """Adapter weights of two dtypes: an error of PEFT's."""
    return changed(f"{path}.data", lambda before: before.bfloat16())


def _weight_norm(layer):
    parametrizations.weight_norm(layer.base_layer)
    return lambda: parametrize.remove_parametrizations(layer.base_layer, "weight")


def _global_hook(layer):
    return register_module_forward_hook(lambda module, args, out: None).remove


def _merged(layer):
    layer.merge()
    return layer.unmerge


def _disabled(layer):
    layer.enable_adapters(False)
    return lambda: layer.enable_adapters(True)


def _activated(names, adds=False):
    def change(layer):
        if adds:
            add(layer, "second")
        layer.set_adapter(names)

        def undo():
            layer.set_adapter("default")
            if adds:
                layer.delete_adapter("second")

        return undo

    return change


def add(layer, name):
    layer.update_layer(name, r=3, lora_alpha=5, config=add.config)
    with torch.no_grad():
        layer.lora_A[name].weight.normal_(generator=torch.Generator().manual_seed(3))
    layer.lora_B[name].weight.requires_grad_(False)


def _without_variant(layer):
    variant = layer.lora_variant.pop("default")
    return lambda: layer.lora_variant.update(default=variant)


BASE, A, B, DROPOUT = "base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"
HOOKED, REPLACED = "hooks on the ", " has been monkey-patched"
OWN, PARTITIONED = "has a forward of its own", "is offloaded or partitioned"
TWICE_BEFORE = {"kind": "forward_pre", "function": lambda module, args: (args[0] * 2,)}
TWICE_BACK = {"kind": "full_backward", "function": lambda module, grads, out: (grads[0] * 2,)}
TWICE_BEFORE_BACK = {"kind": "full_backward_pre", "function": lambda module, grads: (grads[0] * 2,)}
CHANGES = {
    # name: (change of the layer, which returns what undoes it; operators that run then; reason in `explain`)
    "a hook on the base": (_hook(BASE), CALLED, f"{HOOKED}base layer"),
    "a hook on lora_A": (_hook(A), PEFT, f"{HOOKED}lora_A"),
    "a hook on lora_B": (_hook(B), PEFT, f"{HOOKED}lora_B"),
    "a hook on lora_dropout": (_hook(DROPOUT), PEFT, f"{HOOKED}lora_dropout"),
    "a hook before the base": (_hook(BASE, **TWICE_BEFORE), CALLED, f"{HOOKED}base layer"),
    "a hook before lora_B": (_hook(B, **TWICE_BEFORE), PEFT, f"{HOOKED}lora_B"),
    "a hook before its backward": (_hook(BASE, **TWICE_BEFORE_BACK), CALLED, f"{HOOKED}base layer"),
    "a backward hook on the base": (_hook(BASE, **TWICE_BACK), CALLED, f"{HOOKED}base layer"),
    "a backward hook on lora_A": (_hook(A, **TWICE_BACK), PEFT, f"{HOOKED}lora_A"),
    "a forward of the base's own": (
        changed(f"{BASE}.forward", _doubled),
        CALLED,
        f"the base layer {OWN} (offloading or another patch)",
    ),
    "a forward of lora_A's own": (changed(f"{A}.forward", _doubled), PEFT, f"the lora_A {OWN}"),
    "a forward of lora_B's own": (changed(f"{B}.forward", _doubled), PEFT, f"the lora_B {OWN}"),
    "a forward of lora_dropout's own": (
        changed(f"{DROPOUT}.forward", _doubled),
        PEFT,
        f"the lora_dropout {OWN}",
    ),
    "another nn.Linear.forward": (for_all(nn.Linear, "forward"), PEFT, f"Linear.forward{REPLACED}"),
    "another nn.Identity.forward": (for_all(nn.Identity, "forward"), PEFT, f"Identity.forward{REPLACED}"),
    "another nn.Linear.__call__": (for_all(nn.Linear, "__call__"), PEFT, f"Linear.__call__{REPLACED}"),
    "another nn.Identity.__call__": (for_all(nn.Identity, "__call__"), PEFT, f"Identity.__call__{REPLACED}"),
    "another nn.Module.__call__": (for_all(nn.Module, "__call__"), PEFT, f"Module.__call__{REPLACED}"),
    "another functional.linear": (
        for_all(nn.functional, "linear"),
        PEFT,
        f"torch.nn.functional.linear{REPLACED}",
    ),
    "a base weight that is trained": (_trained(f"{BASE}.weight"), CALLED, "the base weight is trainable"),
    "a base bias that is trained": (_trained(f"{BASE}.bias"), CALLED, "the base bias is trainable"),
    "a lora_B that is trained": (_trained(f"{B}.weight"), PEFT, "the lora_B is trainable"),
    "a lora_A that is not": (changed(f"{A}.weight.requires_grad", lambda before: False), FUSED, ""),
    "other numbers in the base": (_tripled(f"{BASE}.weight"), FUSED, ""),
    "other numbers in lora_A": (_tripled(f"{A}.weight"), FUSED, ""),
    "other numbers in lora_B": (_tripled(f"{B}.weight"), FUSED, ""),
    "another base weight": (_other_parameter(f"{BASE}.weight"), FUSED, ""),
    "another lora_A": (_other_parameter(f"{A}.weight"), FUSED, ""),
    "another lora_B": (_other_parameter(f"{B}.weight"), FUSED, ""),
    "a sparse lora_A": (changed(f"{A}.weight", _sparse), PEFT, "the lora_A has layout torch.sparse_coo"),
    "merged": (_merged, PEFT, "the adapter is merged into the weight"),
    "disabled": (_disabled, PEFT, "adapters are disabled"),
    "another adapter": (_activated("second", adds=True), FUSED, ""),
    "two adapters": (_activated(["default", "second"], adds=True), {"linear": 1, **CALLED}, ""),
    "a list of one adapter": (_activated(["default"]), FUSED, ""),
    "no adapter": (_activated("absent"), PEFT, "none of the active adapters ['absent'] is on this layer"),
    "another scaling": (_entry("scaling", 0.25), FUSED, ""),
    "a scaling that is a tensor": (_entry("scaling", torch.tensor(0.5)), FUSED, ""),
    "a scaling that is trained": (
        _entry("scaling", torch.tensor(2.0, requires_grad=True)),
        PEFT,
        "its scaling is trained",
    ),
    "many scalings": (_entry("scaling", torch.rand(20)), PEFT, "its scaling is more than one number"),
    "dropout": (_entry("lora_dropout", nn.Dropout(0.5)), FUSED, ""),
    "dropout of all": (_entry("lora_dropout", nn.Dropout(1.0)), PEFT, "lora_dropout of 1"),
    "another kind of dropout": (
        _entry("lora_dropout", nn.AlphaDropout(0.5)),
        PEFT,
        "dropout of type AlphaDropout",
    ),
    "a global hook": (_global_hook, PEFT, "global module hooks are registered"),
    "no variant": (_without_variant, PEFT, "adapter 'default' is not MiCA"),
    "another kind of base": (changed(f"{BASE}.__class__", _subclass), CALLED, "a base layer of type Other"),
    "a parametrized base": (_weight_norm, CALLED, "a base layer of type ParametrizedLinear"),
    "another kind of layer": (
        changed("__class__", _renamed),
        PEFT,
        "layers of type",
    ),
    "no bias": (changed(f"{BASE}.bias", lambda before: None), FUSED, ""),
    "a bias on lora_A": (_biased(A, 4), PEFT, "a bias on the lora_A"),
    "a bias on lora_B": (_biased(B, 20), PEFT, "lora_bias=True"),
    "a partitioned base": (_partitioned(f"{BASE}.weight"), CALLED, f"the base weight {PARTITIONED}"),
    "a partitioned lora_A": (_partitioned(f"{A}.weight"), PEFT, f"the lora_A {PARTITIONED}"),
    "a partitioned lora_B": (_partitioned(f"{B}.weight"), PEFT, f"the lora_B {PARTITIONED}"),
    "tensor parallelism": (
        changed("_tp_info", lambda before: object()),
        PEFT,
        "tensor parallelism of transformers before 5.17",
    ),
    "tensor parallelism of the base": (
        changed(f"{BASE}._hf_tp_plan", lambda before: "colwise"),
        PEFT,
        "tensor parallelism with plan 'colwise'",
    ),
}
