"""Merging adapters of single parameters, stacks of experts above all: `mica.fast.merge.merging` for them.

PEFT's wrapper of a parameter merges without asking the adapter's variant, so its own methods are replaced.
Stock rounds s·B·A of the whole stack to the dtype of the weight, a second stack in memory, and adds that.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from mica.fast.forward.eligibility import is_mica
from mica.fast.forward.expert_params import parameter_of
from mica.fast.merge.merging import is_covered, merge_into, pop_undo, unmerge_ours
from mica.fast.refusals import check_weight
from mica.fast.settings import around, settings


@around
def merge(stock, self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """MiCA adapters by this backend, after the others by stock."""
    names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
    parameter = parameter_of(self)
    ours = []
    if settings.enabled and any(is_mica(self, name) for name in names):
        check_weight(self)
        ours = [name for name in names if is_covered(self, parameter.data) and is_mica(self, name)]
    others = [name for name in names if name not in ours]
    for name in others:
        pop_undo(self, name)
    if others:
        stock(self, safe_merge, others)
    for name in ours:
        merged = merge_into(self, name, parameter.data, safe_merge)
        if safe_merge and not torch.isfinite(merged).all():
            # PEFT's words
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        parameter.data = merged
        self.merged_adapters.append(name)


@around
def unmerge(stock, self) -> None:
    """In the order opposite to that of the merge; what was merged here to the bits from before."""
    if settings.enabled and any(is_mica(self, name) for name in self.merged_adapters):
        check_weight(self, verb="unmerged from")
    if not self.merged_adapters:
        stock(self)  # it warns
    while self.merged_adapters:
        adapter = self.merged_adapters.pop()
        if adapter not in self.lora_A:
            continue
        if not unmerge_ours(self, adapter, parameter_of(self).data):
            _unmerge_by_stock(stock, self, adapter)


def _unmerge_by_stock(stock, layer, adapter: str) -> None:
    """Stock unmerges all adapters that are merged: for a moment that is this one alone."""
    others = layer.merged_adapters
    layer.merged_adapters = [adapter]
    try:
        stock(layer)
    finally:
        layer.merged_adapters = others
