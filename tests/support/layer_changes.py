"""What may change about a layer between two of its calls: the operators that run then, and what is said."""

import functools
import inspect
import itertools
import operator

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

import mica.fast
from tests.support.models import ADAPTERS, net, randomise

FUSED, CALLED, PEFT = {"linear": 1}, {"linear": 1, "linear_added": 1}, {}
X = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
INPUTS = {  # that are no plain tensors, of a matrix
    "nested": lambda x: torch.nested.nested_tensor([x, x[:2]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
    "sparse": torch.Tensor.to_sparse,
    "sparse rows": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
    "of a subclass": lambda x: x.as_subclass(type("Other", (torch.Tensor,), {})),
}


def layer_of(dtype=torch.float32, adapter="MiCA", **config):
    """One that takes `X`."""
    model = randomise(net(dtype, targets=["up"], **ADAPTERS[adapter], **config))
    add.config = model.peft_config["default"]
    return model.base_model.model.up


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


def _set(path, value):
    return changed(path, lambda before: value)


def _subclass(kind):
    return type("Other", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


class _Scalings(dict):
    """Scalings that are computed when they are read, from others than a reader of the raw memory finds."""

    def __getitem__(self, name):
        return 3


def _renamed(kind):
    return type("Other", (kind,), {})


def _doubled(forward):
    return lambda x: 2 * forward(x)


def _tripled(weight):
    """In other memory: the tensor is the same object."""
    return weight * 3


def _other(weight):
    return nn.Parameter(weight.detach() * 3, weight.requires_grad)


def _sparse(weight):
    return nn.Parameter(weight.detach().to_sparse())


def _global_hook(layer):
    return register_module_forward_hook(lambda *_: None).remove


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


def _weight_norm(layer):
    parametrizations.weight_norm(layer.base_layer)
    return lambda: parametrize.remove_parametrizations(layer.base_layer, "weight")


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
    layer.lora_B[name].weight.requires_grad_(name not in layer.lora_variant)


def _without_variant(layer):
    variant = layer.lora_variant.pop("default")
    return lambda: layer.lora_variant.update(default=variant)


def _dora(layer):
    layer.lora_variant["default"] = DoraLinearVariant()
    DoraLinearVariant.init(layer, "default")

    def undo():
        del layer.lora_variant["default"], layer.lora_magnitude_vector["default"]

    return undo


def _without_setting(layer):
    mica.fast.enable(lora=False)
    return lambda: mica.fast.enable(lora=True)


BASE, A, B, DROPOUT = "base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"
PARTS = {"base layer": BASE, "lora_A": A, "lora_B": B, "lora_dropout": DROPOUT}
BASE_WEIGHT, A_WEIGHT, B_WEIGHT = (f"{part}.weight" for part in (BASE, A, B))
HOOKED, PARALLEL = "hooks on the ", "tensor parallelism"
_TRAINED = torch.tensor(2.0, requires_grad=True)
TWICE_BEFORE = {"kind": "forward_pre", "function": lambda module, args: (args[0] * 2,)}
TWICE_BACK = {"kind": "full_backward", "function": lambda module, grads, out: (grads[0] * 2,)}
TWICE_BEFORE_BACK = {"kind": "full_backward_pre", "function": lambda module, grads: (grads[0] * 2,)}
CHANGES = {
    # name: (change of the layer, which returns what undoes it; operators that run then; reason in `explain`)
    "a hook before the base": (_hook(BASE, **TWICE_BEFORE), CALLED, f"{HOOKED}base layer"),
    "a hook before lora_B": (_hook(B, **TWICE_BEFORE), PEFT, f"{HOOKED}lora_B"),
    "a hook before its backward": (_hook(BASE, **TWICE_BEFORE_BACK), CALLED, f"{HOOKED}base layer"),
    "a backward hook on the base": (_hook(BASE, **TWICE_BACK), CALLED, f"{HOOKED}base layer"),
    "a backward hook on lora_A": (_hook(A, **TWICE_BACK), PEFT, f"{HOOKED}lora_A"),
    "a trained weight": (_set(f"{BASE_WEIGHT}.requires_grad", True), CALLED, "the base weight is trainable"),
    "a trained bias": (_set(f"{BASE}.bias.requires_grad", True), CALLED, "the base bias is trainable"),
    "a partitioned bias": (
        _set(f"{BASE}.bias.ds_id", 0),
        CALLED,
        "the base bias is partitioned",
    ),
    "a frozen lora_A": (_set(f"{A_WEIGHT}.requires_grad", False), FUSED, ""),
    "a sparse lora_A": (changed(A_WEIGHT, _sparse), PEFT, "the lora_A has layout torch.sparse_coo"),
    "merged": (_merged, PEFT, "the adapter is merged into the weight"),
    "disabled": (_disabled, PEFT, "adapters are disabled"),
    "another adapter": (_activated("second", adds=True), FUSED, ""),
    "two adapters": (_activated(["default", "second"], adds=True), {"linear": 2, "linear_added": 1}, ""),
    "a list of one adapter": (_activated(["default"]), FUSED, ""),
    "no adapter": (_activated("absent"), PEFT, "none of the active adapters ['absent'] is on this layer"),
    "another scaling": (_entry("scaling", 0.25), FUSED, ""),
    "a scaling that is a tensor": (_entry("scaling", torch.tensor(0.5)), FUSED, ""),
    "a scaling that is computed": (changed("scaling", _Scalings), FUSED, ""),
    "a trained scaling": (_entry("scaling", _TRAINED), PEFT, "its scaling is trained"),
    "many scalings": (_entry("scaling", torch.rand(20)), PEFT, "its scaling is more than one number"),
    "dropout": (_entry("lora_dropout", nn.Dropout(0.5)), FUSED, ""),
    "dropout of all": (_entry("lora_dropout", nn.Dropout(1.0)), PEFT, "lora_dropout of 1"),
    "alpha dropout": (_entry("lora_dropout", nn.AlphaDropout(0.5)), PEFT, "dropout of type AlphaDropout"),
    "a global hook": (_global_hook, PEFT, "global module hooks are registered"),
    "another kind of base": (changed(f"{BASE}.__class__", _subclass), CALLED, "a base layer of type Other"),
    "a parametrized base": (_weight_norm, CALLED, "a base layer of type ParametrizedLinear"),
    "another kind of layer": (changed("__class__", _renamed), PEFT, "layers of type"),
    "no bias": (_set(f"{BASE}.bias", None), FUSED, ""),
    "a bias on lora_A": (_set(f"{A}.bias", nn.Parameter(torch.ones(4))), PEFT, "a bias on the lora_A"),
    "a bias on lora_B": (_set(f"{B}.bias", nn.Parameter(torch.ones(20))), PEFT, "lora_bias=True"),
    "old parallelism": (_set("_tp_info", object()), PEFT, PARALLEL),
    "parallelism": (_set(f"{BASE}._hf_tp_plan", "colwise"), PEFT, PARALLEL),
}
for _name, _part in PARTS.items():
    _left = CALLED if _part == BASE else PEFT
    _more = " (offloading or another patch)" if _part == BASE else ""
    CHANGES[f"a hook on the {_name}"] = _hook(_part), _left, f"{HOOKED}{_name}"
    CHANGES[f"a forward of the {_name}'s own"] = (
        changed(f"{_part}.forward", _doubled),
        _left,
        f"the {_name} has a forward of its own{_more}",
    )
for _name, _path in {"base weight": BASE_WEIGHT, "lora_A": A_WEIGHT, "lora_B": B_WEIGHT}.items():
    _left = CALLED if _path == BASE_WEIGHT else PEFT
    _said = f"the {_name} is partitioned"
    CHANGES[f"a partitioned {_name}"] = _set(f"{_path}.ds_id", 0), _left, _said
    CHANGES[f"other numbers in the {_name}"] = changed(f"{_path}.data", _tripled), FUSED, ""
    CHANGES[f"another {_name}"] = changed(_path, _other), FUSED, ""
for _owner, _name in (
    *itertools.product((nn.Linear, nn.Identity), ("forward", "__call__")),
    (nn.Module, "__call__"),
    (nn.functional, "linear"),
):
    _said = f"{_owner.__name__}.{_name}"
    CHANGES[f"another {_said}"] = for_all(_owner, _name), PEFT, f"{_said} has been monkey-patched"

_EXCLUDED = "adapter 'default' is LoRA, which mica.fast.enable(lora=True) includes"
CHANGES_OF = {  # adapter: all changes of it
    "MiCA": {
        **CHANGES,
        "a trained lora_B": (_set(f"{B_WEIGHT}.requires_grad", True), PEFT, "the lora_B is trainable"),
        "no variant": (_without_variant, PEFT, _EXCLUDED),
    },
    "LoRA": {
        **CHANGES,
        "a frozen lora_B": (_set(f"{B_WEIGHT}.requires_grad", False), FUSED, ""),
        "a sparse lora_B": (changed(B_WEIGHT, _sparse), PEFT, "the lora_B has layout torch.sparse_coo"),
        "DoRA": (_dora, FUSED | {"grad_magnitude": 1}, ""),
        "without the setting": (_without_setting, PEFT, _EXCLUDED),
    },
}
