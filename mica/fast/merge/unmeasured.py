"""Merges into quantised weights: their library rounds again, and what that loses is not measured here."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from peft.tuners import lora
from torch import nn

from mica.fast.create import quantised
from mica.fast.forward.eligibility import is_mica

# Plain layers into which an adapter was merged before PEFT's layer around them was taken away, and the kind
# of their weights. Keyed by the module, and gone with it.
_unloaded: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def kind_merged_into(layer: nn.Module) -> str | None:
    """The kind of quantised weight that a MiCA adapter is merged into now; None if there is none."""
    if not isinstance(layer, lora.LoraLayer):
        return _unloaded.get(layer)
    return _kind(layer, layer.merged_adapters)


def to_be_merged(model: nn.Module, adapter_names: list[str] | None, merge: bool) -> dict[str, str]:
    """The quantised layers that an unloading leaves with a merged MiCA adapter, and their kinds.

    adapter_names: those to merge; None: the active ones. merge: whether it merges any.
    """
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        adapters = list(layer.merged_adapters)
        if merge and adapter_names is None:
            adapters += layer.active_adapters
        elif merge:
            adapters += adapter_names
        kind = _kind(layer, adapters)
        if kind is not None:
            found[name] = kind
    return found


def note_unloaded(model: nn.Module, merged: dict[str, str]) -> None:
    """``merged``: what `to_be_merged` has said of the model before."""
    for name, kind in merged.items():
        _unloaded[model.get_submodule(name)] = kind


def _kind(layer: lora.LoraLayer, adapters: list[str]) -> str | None:
    kind = quantised.kind_of(layer)
    if kind is None or not any(is_mica(layer, adapter) for adapter in adapters):
        return None
    return kind.name
