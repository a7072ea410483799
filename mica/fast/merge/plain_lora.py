"""Merging plain LoRA and DoRA of linear layers as MiCA: in fp32, rounded once, with a record that undoes it.

PEFT's linear layer merges plain LoRA itself, and any other adapter by the methods of its variant. While it
merges or unmerges, these adapters have another variant: order, checks, errors and warnings stay PEFT's.

DoRA's norms are those of W + s·B·A without any other adapter in W. Where one is merged already PEFT's code
merges DoRA, which takes that out of W for the moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor

from mica.fast.forward.eligibility import is_dora, is_lora
from mica.fast.merge.merging import RECORDS, is_as_merged, is_covered, merge_into, pop_undo, unmerge_from
from mica.fast.merge.unloading import requested
from mica.fast.settings import around, settings


class _Variant:
    """The methods of a variant that PEFT calls to merge and unmerge an adapter."""

    @staticmethod
    def merge_safe(layer: lora.Linear, adapter: str, weight: Tensor) -> Tensor:
        merged = merge_into(layer, adapter, weight, safe=True)
        _tell_stock(layer, adapter)
        return merged

    @staticmethod
    def merge_unsafe(layer: lora.Linear, adapter: str, weight: Tensor) -> None:
        merge_into(layer, adapter, weight.detach(), safe=False)
        _tell_stock(layer, adapter)

    @staticmethod
    def unmerge(layer: lora.Linear, adapter: str, weight: Tensor) -> Tensor:
        unmerge_from(layer, adapter, weight.data, pop_undo(layer, adapter))
        layer._caches.pop(_NORMS.format(adapter), None)
        return weight.data


_NORMS = "{}-weight_norm"  # PEFT's name for the norms of a merged DoRA adapter


def _tell_stock(layer: lora.Linear, adapter: str) -> None:
    """The norms by which PEFT's code would unmerge DoRA, once this package is uninstalled."""
    undo = vars(layer).get(RECORDS, {}).get(adapter)
    if undo is not None and undo.update.factor is not None:
        magnitude = layer.lora_magnitude_vector[adapter].weight.detach()
        layer._cache_store(_NORMS.format(adapter), magnitude / undo.update.factor)


@contextmanager
def _as_variants(layer: lora.Linear, adapters: list[str]) -> Iterator[None]:
    before = dict(layer.lora_variant)
    layer.lora_variant.update(dict.fromkeys(adapters, _Variant))
    try:
        yield
    finally:
        layer.lora_variant.clear()
        layer.lora_variant.update(before)


def _is_weight_covered(layer: lora.Linear) -> bool:
    """Whether the base weight is a parameter, not computed from others, that this backend merges into."""
    weight = layer.get_base_layer()._parameters.get("weight")
    return weight is not None and is_covered(layer, weight)


@around
def merge(stock, self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """By this backend with ``enable(lora=True)``, but for adapters with a bias of their own."""
    ours = []
    if settings.enabled and _is_weight_covered(self):
        first = [] if self.merged_adapters else requested(self, adapter_names)[:1]
        for name in self.lora_A:
            is_ours = is_lora(self, name) or (is_dora(self, name) and name in first)
            if is_ours and not self.lora_bias[name]:
                ours.append(name)
    for name in {*vars(self).get(RECORDS, ())}.difference(self.merged_adapters):
        pop_undo(self, name)  # stock unmerged it, or it was deleted while merged
    with _as_variants(self, ours):
        stock(self, safe_merge, adapter_names)


def _is_unmerged_here(layer: lora.Linear, adapter: str) -> bool:
    """Plain LoRA always; DoRA's present norms say nothing of a weight that stock has merged again since."""
    variant = layer.lora_variant.get(adapter)
    if type(variant) is DoraLinearVariant:
        return is_as_merged(vars(layer)[RECORDS][adapter], layer.get_base_layer().weight)
    return variant is None


@around
def unmerge(stock, self) -> None:
    """What has a record by that, whatever the settings are now; the rest by stock, which merged it."""
    recorded = vars(self).get(RECORDS, ())
    ours = []
    if _is_weight_covered(self):
        ours = [name for name in recorded if _is_unmerged_here(self, name)]
    with _as_variants(self, ours):
        stock(self)
