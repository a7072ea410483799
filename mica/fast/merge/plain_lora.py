"""Merging plain LoRA of linear layers as MiCA is merged: in fp32, rounded once, with a record that undoes it.

PEFT's linear layer merges plain LoRA itself, and any other adapter by the methods of its variant. While it
merges or unmerges, plain LoRA has a variant here: order, checks, errors and warnings stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners import lora
from torch import Tensor

from mica.fast.forward.eligibility import is_lora
from mica.fast.merge.merging import RECORDS, is_covered, merge_into, pop_undo, unmerge_from
from mica.fast.settings import around, settings


class _Variant:
    """The methods of a variant that PEFT calls to merge and unmerge an adapter."""

    @staticmethod
    def merge_safe(layer: lora.Linear, adapter: str, weight: Tensor) -> Tensor:
        return merge_into(layer, adapter, weight, safe=True)

    @staticmethod
    def merge_unsafe(layer: lora.Linear, adapter: str, weight: Tensor) -> None:
        merge_into(layer, adapter, weight.detach(), safe=False)

    @staticmethod
    def unmerge(layer: lora.Linear, adapter: str, weight: Tensor) -> Tensor:
        unmerge_from(layer, adapter, weight.data, pop_undo(layer, adapter))
        return weight.data


@contextmanager
def _as_variants(layer: lora.Linear, adapters: list[str]) -> Iterator[None]:
    layer.lora_variant.update(dict.fromkeys(adapters, _Variant))
    try:
        yield
    finally:
        for adapter in adapters:
            del layer.lora_variant[adapter]


def _is_weight_covered(layer: lora.Linear) -> bool:
    """Whether the base weight is a parameter, not computed from others, that this backend merges into."""
    weight = layer.get_base_layer()._parameters.get("weight")
    return weight is not None and is_covered(layer, weight)


@around
def merge(stock, self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Plain LoRA by this backend with ``enable(lora=True)``, but for adapters with a bias of their own."""
    ours = []
    if settings.enabled and _is_weight_covered(self):
        ours = [name for name in self.lora_A if is_lora(self, name) and not self.lora_bias[name]]
    for name in {*vars(self).get(RECORDS, ())}.difference(self.merged_adapters):
        pop_undo(self, name)  # stock unmerged it, or it was deleted while merged
    with _as_variants(self, ours):
        stock(self, safe_merge, adapter_names)


@around
def unmerge(stock, self) -> None:
    """What has a record by that, whatever the settings are now; the rest by stock, which merged it."""
    recorded = vars(self).get(RECORDS, ())
    ours = []
    if _is_weight_covered(self):
        ours = [name for name in recorded if name not in self.lora_variant]
    with _as_variants(self, ours):
        stock(self)
