"""Which path each adapted layer takes, and why it is not ours where it is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mica import backend
from mica.fast import patching
from mica.fast.eligibility import (
    MiCAEmbeddingVariant,
    MiCALinearVariant,
    adapter_weights,
    adapters_of,
    why_called,
    why_not,
)
from mica.fast.settings import settings

KERNEL, REFERENCE, PEFT, ERROR = "kernel", "reference", "peft", "error"


@dataclass(frozen=True)
class Row:
    name: str
    layer: str
    adapter: str
    path: str  # "kernel", "reference", "peft" or "error"
    reason: str  # why it is not the path before it in that list, and why the base layer is called, if it is


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

    Path "kernel": the fused operators on Triton kernels; "reference": their PyTorch form, with the reason why
    kernels do not run; "peft": PEFT's own code, with the reason; "error": MICA_BACKEND=triton demands kernels
    that this layer cannot have, and a call raises. A base layer whose weight cannot be read directly is
    called, the reason says why, and only the adapter runs on the operators. What only a call can show (the
    dtype of the activations, other arguments) is not in the table.
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = type(module.get_base_layer()).__name__
            rows.append(Row(name, base, _adapters(module), *_path(module)))
    return Explanation(rows)


def _path(layer) -> tuple[str, str]:
    """(path, reason) of one layer."""
    reason = _reason(layer)
    if reason:
        return PEFT, reason
    called = None if isinstance(layer, lora.Embedding) else why_called(layer)
    reasons = [f"base layer called: {called}"] if called else []
    for name in adapters_of(layer):
        lora_A, lora_B = adapter_weights(layer, name)
        dtypes = (lora_A.dtype, lora_B.dtype)
        if not called:
            dtypes = (layer.get_base_layer().weight.dtype, *dtypes)
        refused = backend.why_not_kernels(lora_A.device, lora_A.shape[0], *dtypes)
        if refused:
            path = ERROR if backend.requested() == "triton" else REFERENCE
            return path, "; ".join([refused, *reasons])
    return KERNEL, "; ".join(reasons)


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
