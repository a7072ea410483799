"""Which path each adapted layer takes, and why it is not ours where it is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mica.fast import patching
from mica.fast.eligibility import MiCAEmbeddingVariant, MiCALinearVariant, why_not
from mica.fast.settings import settings

REFERENCE, PEFT = "reference", "peft"


@dataclass(frozen=True)
class Row:
    name: str
    layer: str
    adapter: str
    path: str  # "kernel", "reference" or "peft"
    reason: str  # empty where the path is ours


@dataclass(frozen=True)
class Explanation:
    """The path table. ``str()`` prints it; ``rows`` and ``counts()`` are for programs."""

    rows: list[Row] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        return dict(Counter(row.path for row in self.rows))

    def __str__(self) -> str:
        if not self.rows:
            return "no adapted layers"
        header = Row("layer", "base", "adapter", "path", "reason")
        columns = ("name", "layer", "adapter", "path")
        table = [header, *self.rows]
        widths = {column: max(len(getattr(row, column)) for row in table) for column in columns}
        return "\n".join(
            "  ".join(
                [*(getattr(row, column).ljust(widths[column]) for column in columns), row.reason]
            ).rstrip()
            for row in table
        )


def explain(model: nn.Module) -> Explanation:
    """The path that each adapted layer of the model takes in its present state.

    Path "reference": the PyTorch form of the fused operators; "kernel": their Triton form; "peft": PEFT's
    own code, with the reason. What only a call can show (a mixed batch with ``adapter_names``, activations
    of another dtype than the weight) is not in the table; such a call runs on PEFT's code.
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = type(module.get_base_layer()).__name__
            reason = _reason(module)
            rows.append(Row(name, base, _adapters(module), PEFT if reason else REFERENCE, reason or ""))
    return Explanation(rows)


def _adapters(layer) -> str:
    names = []
    for name in layer.active_adapters:
        variant = getattr(layer, "lora_variant", {}).get(name)
        mica = type(variant) in (MiCALinearVariant, MiCAEmbeddingVariant)
        names.append(f"{name} (MiCA)" if mica else name)
    return ", ".join(names)


def _reason(layer) -> str | None:
    if not patching.is_installed():
        return "mica.fast is not installed"
    if not settings.enabled:
        return "mica.fast is disabled"
    if "forward" in vars(layer):
        stock = getattr(layer, "_old_forward", None)
        if getattr(stock, "__func__", None) not in (lora.Linear.forward, lora.Embedding.forward):
            return "the layer has a forward of its own, set before mica.fast was imported"
    return why_not(layer)
