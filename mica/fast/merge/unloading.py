"""Which merges need no undo: those after which PEFT takes the layer out of the model.

`merge_and_unload` merges one layer after the other, and at once puts its base layer in its place. What would
unmerge the layer goes with it, so it is not made, unless the layer may stay because something else fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mica.fast import known_peft


class _Unloading(NamedTuple):
    """A call of PEFT's `_unload_and_optionally_merge` in this thread."""

    layers: set[nn.Module]  # those that leave the model for good
    adapter_names: Sequence[str] | None  # None: each layer's active ones


_unloading: ContextVar[_Unloading | None] = ContextVar("unloading", default=None)


@contextmanager
def merging_and_unloading(
    tuner: nn.Module, layers: dict[lora.LoraLayer, list[str]], adapter_names: Sequence[str] | None
) -> Iterator[None]:
    """Within, PEFT takes the layers of this model out of it, and may merge each right before.

    tuner: PEFT's model; only plain LoRA's is known to do so. layers: its `lora_layers`. PEFT replaces a layer
    only where it finds it first.
    """
    leaving = set()
    if isinstance(tuner, lora.LoraModel) and known_peft.unloads_as_known():
        leaving = {layer for layer, names in layers.items() if len(names) == 1}
    token = _unloading.set(_Unloading(leaving, adapter_names))
    try:
        yield
    finally:
        _unloading.reset(token)


def needs_undo(layer: nn.Module, adapter: str) -> bool:
    """Whether the layer may stay in the model after a merge of this adapter, which now begins.

    It leaves at once unless more is merged before that and may be refused: another adapter, or the adapter of
    another parameter of the same module, whose layer is inside of this one.
    """
    unloading = _unloading.get()
    if unloading is None or layer not in unloading.layers or isinstance(layer.base_layer, BaseTunerLayer):
        return True
    adapted = {*layer.lora_A, *layer.lora_embedding_A} - {*layer.merged_adapters}
    return [name for name in requested(layer, unloading.adapter_names) if name in adapted] != [adapter]


def requested(layer: lora.LoraLayer, adapter_names: Sequence[str] | None) -> Sequence[str]:
    """The adapters that a call of PEFT's merges into the layer: the active ones where it names none."""
    if adapter_names is None:
        return layer.active_adapters
    return adapter_names


def lora_layers(model: nn.Module) -> dict[lora.LoraLayer, list[str]]:
    """Each LoRA layer and its names, several where the model refers to it at several places.

    In the order of ``model.named_modules()``, in less than half of its time. Within a LoRA layer only its
    base layer may hold others.
    """
    found = {}
    seen = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        children = module._modules
        if isinstance(module, lora.LoraLayer):
            found.setdefault(module, []).append(name)
            children = {"base_layer": module.base_layer}
        if module in seen:
            continue
        seen.add(module)
        prefix = f"{name}." if name else ""
        for key, child in reversed(children.items()):
            if child is not None:
                waiting.append((f"{prefix}{key}", child))
    return found
