"""Merges into quantised weights: their library rounds again, and what that loses is not measured here."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from peft.tuners import lora
from torch import nn

from mica.fast.create import quantised
from mica.fast.forward.eligibility import is_mica
from mica.fast.merge.unloading import lora_layers, requested

# Plain layers into which an adapter was merged before PEFT's layer around them was taken away, and the kind
# of their weights. Keyed by the module, and gone with it.
_unloaded: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def kind_merged_into(layer: nn.Module) -> str | None:
    """The kind of quantised weight that a MiCA adapter is merged into now; None if there is none."""
    if not isinstance(layer, lora.LoraLayer):
        return _unloaded.get(layer)
    return _kind(layer, layer.merged_adapters)


def kinds_after_merge(model: nn.Module, adapter_names: list[str] | None) -> dict[str, str]:
    """The quantised layers that an unloading leaves with a merged MiCA adapter, and their kinds.

    adapter_names: the adapters to merge; None: the active ones.
    """
    found = {}
    for name, layer in lora_layers(model):
        kind = _kind(layer, [*layer.merged_adapters, *requested(layer, adapter_names)])
        if kind is not None:
            found[name] = kind
    return found


def note_unloaded(model: nn.Module, kinds: dict[str, str]) -> None:
    """``kinds``: what `kinds_after_merge` has said of the model before."""
    for name, kind in kinds.items():
        _unloaded[model.get_submodule(name)] = kind


def _kind(layer: lora.LoraLayer, adapters: list[str]) -> str | None:
    kind = quantised.kind_of(layer)
    if kind is None or not any(is_mica(layer, adapter) for adapter in adapters):
        return None
    return kind.name
