"""`merge_report`: what is merged into a model now, or was when PEFT took its layers away."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary

from peft.tuners import lora
from torch import nn

from mica.fast.create import quantised
from mica.fast.forward.eligibility import is_mica
from mica.fast.forward.expert_params import weight_name
from mica.fast.merge.merging import stats_of_merged
from mica.fast.merge.report import MergeReport, MergeStats
from mica.fast.merge.unloading import lora_layers, merging_and_unloading
from mica.fast.refusals import check_model, check_weights
from mica.fast.settings import while_enabled


class _Merged(NamedTuple):
    """What is known of the adapters that are merged into a weight of a layer."""

    weight: str  # its name in the base layer
    stats: MergeStats | None  # None where this backend has merged none of them
    kind: str | None  # a quantised weight's: its library rounds again, and nobody measures that


# What was merged into base layers when the PEFT layers around them were taken away. Keyed by the module, and
# gone with it.
_unloaded: WeakKeyDictionary[nn.Module, list[_Merged]] = WeakKeyDictionary()


def merge_report(model: nn.Module) -> MergeReport:
    """What rounding did to the adapters now merged into the model (also after ``merge_and_unload``).

    Raises:
        TypeError: ``model`` is not a `torch.nn.Module`.
    """
    check_model(model, "merge_report")
    report = MergeReport()
    wrapped = set()  # base layers inside of PEFT's, which report for them
    for name, module in model.named_modules():
        if module in wrapped:
            continue
        if isinstance(module, lora.LoraLayer):
            wrapped.add(module.get_base_layer())
        for weight, stats, kind in _merged_into(module):
            if kind is not None:
                report.unmeasured[name] = kind
            if stats is not None:
                shown = name
                if weight != "weight":  # of several that may be adapted
                    shown = f"{name.replace('.base_layer', '')}.{weight}"
                report.layers[shown] = stats
    return report


def kind_merged_into(module: nn.Module) -> str | None:
    """The kind of quantised weight that a MiCA adapter is merged into now; None if there is none."""
    return next((merged.kind for merged in _merged_into(module)), None)


def _merged_into(module: nn.Module) -> list[_Merged]:
    if not isinstance(module, lora.LoraLayer):
        return _unloaded.get(module, [])
    kind = quantised.kind_of(module)
    has_mica = any(is_mica(module, adapter) for adapter in module.merged_adapters)
    name = kind.name if kind and has_mica else None
    return [_Merged(weight_name(module), stats_of_merged(module), name)]


def _note_unloaded(layers: Iterable[lora.LoraLayer]) -> None:
    noted = defaultdict(list)
    for layer in layers:
        for merged in _merged_into(layer):
            if merged.stats is not None or merged.kind is not None:
                noted[layer.get_base_layer()].append(merged)
    _unloaded.update(noted)


@while_enabled
def unload_and_optionally_merge(
    stock, self, merge=True, progressbar=False, safe_merge=False, adapter_names=None, **kwargs
):
    layers = lora_layers(self.model)
    if merge:
        check_weights(layers, adapter_names)
    try:
        with merging_and_unloading(self, layers, adapter_names):
            return stock(self, merge, progressbar, safe_merge, adapter_names, **kwargs)
    finally:  # after an error, some of them are gone
        _note_unloaded(layers)
