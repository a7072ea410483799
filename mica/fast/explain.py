"""`explain`: which path each adapted layer takes, and why where it is not this backend's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed import is_available as has_distributed

from mica import backend
from mica.fast import bypassed, calls, expert_stacks, experts, patching
from mica.fast.eligibility import (
    adapter_weights,
    adapters_of,
    class_of,
    is_mica,
    quantised_layers,
    why_called,
    why_not,
    why_not_active,
)
from mica.fast.settings import settings

KERNEL, REFERENCE, PEFT, ERROR = "kernel", "reference", "peft", "error"
_HEADER = ("layer", "base", "adapter", "path", "reason")


@dataclass(frozen=True)
class Row:
    name: str
    layer: str
    adapter: str
    path: str  # "kernel", "reference", "peft" or "error"
    reason: str  # why not the path before it in that list; why the base layer is called, if it is
    calls: int | None = None  # in the last forward of the whole model; None if unknown
    bypassed_by: str | None = None  # the framework or module whose code runs instead of the layer's


@dataclass(frozen=True)
class Explanation:
    """The path table. ``str()`` prints it, equal rows as one; ``rows`` and ``counts()`` are for programs."""

    rows: list[Row] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        return dict(Counter(row.path for row in self.rows))

    def __str__(self) -> str:
        return _text(self.rows)


def explain(model: nn.Module) -> Explanation:
    """The path that each adapted layer of the model takes in its current state.

    Path "kernel": the fused operators on Triton kernels; "reference": their PyTorch form, with the reason why
    kernels do not run; "peft": PEFT's own code, with the reason; "error": MICA_BACKEND=triton demands kernels
    that do not exist for this layer, and a call raises. A base layer whose weight cannot be read directly is
    called, the reason says why, and only the adapter runs on the operators. Weights that FSDP2 has sharded
    with a module around the layer count as the plain tensors that they are while that module's forward runs.

    What only a call can show (dtype of the activations, autocast, other arguments) comes from the PEFT
    model's last completed forward with the backend on: a layer whose adapter PEFT's code ran there has the
    path "peft", and its reason names that forward. Where ``calls`` is unknown, so is that, and the table is
    about the state of the layers alone.

    ``calls`` of a row: how often the layer was called, on any path, in the PEFT model's last completed
    forward (`generate` has none). 0: something bypasses it, like a framework that has replaced the forward of
    the module around it. None if unknown: before the first forward and after adapters
    have been added, for layers that are not covered, and once torch.compile has traced a MiCA layer in this
    process.

    ``bypassed_by``: where other code runs instead of the layer, the framework's name (axolotl, unsloth) or
    that of the module with the code; ``str()`` says how to switch it off (see `mica.fast.bypassed`).
    """
    rows, counts, by_peft = [], calls.counts(), calls.peft_reasons()
    modules = dict(model.named_modules())
    entered = bypassed.around([name for name, module in modules.items() if counts.get(module)])
    for name, module in modules.items():
        if isinstance(module, BaseTunerLayer):
            base = type(module.get_base_layer()).__name__
            outermost, shown = module, name
            if expert_stacks.is_wrapper(module):  # adapters of parameters of one module are nested
                while name.endswith(".base_layer"):
                    name = name.removesuffix(".base_layer")
                outermost, shown = model.get_submodule(name), f"{name}.{module.parameter_name}"
                while outermost is not module and outermost.merged:  # it only calls the next
                    outermost = outermost.base_layer
            with _as_gathered(model, name, outermost):
                count = counts.get(module) if _is_counted(module) else None
                around = count == 0 and bypassed.bypassed_by(modules, name, entered)
                by = around or bypassed.replaced_by(module)
                path, reason = _path(module, outermost)
                if path in (KERNEL, REFERENCE) and outermost in by_peft:
                    path, reason = PEFT, _in_the_last_forward(by_peft[outermost], count)
                rows.append(Row(shown, base, _adapters(module), path, reason, count, by))
    return Explanation(rows)


@contextmanager
def _as_gathered(model: nn.Module, name: str, layer: nn.Module) -> Iterator[None]:
    """Plain shards in place of the weights that FSDP2 gathers before this layer is called."""
    parents = [model.get_submodule(name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1)]
    replaced = []
    if _is_fsdp(model, layer, *parents):
        for module in layer.modules():
            for key, parameter in module._parameters.items():
                if hasattr(parameter, "to_local"):
                    shard = nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
                    replaced.append((module._parameters, key, parameter))
                    module._parameters[key] = shard
    try:
        yield
    finally:
        for parameters, key, parameter in replaced:
            parameters[key] = parameter


def _is_fsdp(*modules: nn.Module) -> bool:
    if not has_distributed():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in modules)


def _path(layer, outermost) -> tuple[str, str]:
    """(path, reason) of one layer; ``outermost``: of those nested around one module, else the layer."""
    of_stack = expert_stacks.is_wrapper(layer)
    reason = _reason(layer, outermost)
    if reason:
        return PEFT, reason
    has_kernels = not isinstance(layer, lora.Embedding)
    called = None if of_stack or not has_kernels else why_called(layer)
    reasons = [f"base layer called: {called}"] if called else []
    for name in adapters_of(layer):
        lora_A, lora_B = adapter_weights(layer, name)
        dtypes = (lora_A.dtype, lora_B.dtype)
        if not called:
            weight = expert_stacks.parameter_of(layer) if of_stack else layer.get_base_layer().weight
            dtypes = (weight.dtype, *dtypes)
        refused = backend.why_not_kernels(lora_A.device, layer.r[name], *dtypes)
        if not has_kernels:
            return REFERENCE, refused or "embeddings have no kernels"
        if refused:
            path = ERROR if backend.requested() == "triton" else REFERENCE
            return path, "; ".join([refused, *reasons])
    return KERNEL, "; ".join(reasons)


def _in_the_last_forward(reasons: list[str], calls: int | None) -> str:
    part = "" if calls in (None, len(reasons)) else f"{len(reasons)} of {calls} calls of "
    return f"in {part}the last forward: {'; '.join(dict.fromkeys(reasons))}"


def _adapters(layer) -> str:
    names = layer.active_adapters
    return ", ".join(f"{name} (MiCA)" if is_mica(layer, name) else name for name in names)


def _reason(layer, outermost) -> str | None:
    if not patching.is_installed():
        return "mica.fast is not installed"
    if not settings.enabled:
        return "mica.fast is disabled"
    if who := bypassed.replaced_by(layer):
        return f"{who} has replaced the layer's forward"
    if _has_own_forward(layer):
        return "the layer has a forward of its own, set before mica.fast was imported"
    if not expert_stacks.is_wrapper(layer):
        return why_not(layer)
    return experts.why_not(outermost) if adapters_of(layer) else why_not_active(layer)


def _has_own_forward(layer) -> bool:
    """Whether the instance has a forward that does not call its class's current one."""
    if "forward" not in vars(layer):
        return False
    return getattr(getattr(layer, "_old_forward", None), "__func__", None) is not type(layer).forward


def _is_counted(layer) -> bool:
    """Whether the layer's calls pass through the forwards of `mica.fast.layers`."""
    kind, covered = class_of(layer), (lora.Linear, lora.Embedding, expert_stacks.ParamWrapper)
    is_covered = kind in covered or kind in quantised_layers
    is_ours = patching.is_installed() and not bypassed.replaced_by(layer)
    return is_ours and is_covered and not _has_own_forward(layer)


# ---------------------------------------------------------------------------------------------------
# the table as text
# ---------------------------------------------------------------------------------------------------


def _text(rows: list[Row]) -> str:
    """Aligned lines in the order of the layers, one for all equal rows, and the totals."""
    if not rows:
        return "no adapted layers"
    equal: dict[tuple, list[str]] = {}
    for row in rows:
        numberless = re.sub(r"\d+", "#", row.name)
        equal.setdefault((numberless, row.layer, row.adapter, row.path, _remark(row)), []).append(row.name)
    lines = [_HEADER]
    for (_, *rest), names in equal.items():
        for pattern, count in patterns(names):
            lines.append((pattern + (f"  ×{count}" if count > 1 else ""), *rest))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    printed = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in lines
    ]
    return "\n".join([*printed, _totals(rows), *_bypasses(rows)])


def _remark(row) -> str:
    by = f", bypassed by {row.bypassed_by}" if row.bypassed_by else ""
    texts = {None: "", 0: f"not called in the last forward{by}", 1: ""}
    calls = texts.get(row.calls, f"called {row.calls} times in the last forward")
    return "; ".join(filter(None, (row.reason, calls)))


def _totals(rows) -> str:
    paths = Counter(row.path for row in rows)
    parts = [", ".join(f"{count} {path}" for path, count in paths.items())]
    uncalled = sum(row.calls == 0 for row in rows)
    if uncalled:
        parts.append(f"{uncalled} not called in the last forward")
    return f"{len(rows)} layer{'s' if len(rows) > 1 else ''}: {'; '.join(parts)}"


def _bypasses(rows) -> Iterator[str]:
    """A line for each framework, or other module, whose code runs instead of layers."""
    for who, count in Counter(row.bypassed_by for row in rows if row.bypassed_by).items():
        remedy = f": {bypassed.REMEDIES[who]}" if who in bypassed.REMEDIES else ""
        yield f"{who} bypasses {count} layer{'s' if count > 1 else ''}{remedy}"


def patterns(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ only in numbers -> patterns that match these and no others, and how many each.

    "h.0.fc", "h.1.fc", "h.3.fc" -> [("h.{0-1,3}.fc", 3)]. Two numbers become one pattern only where every
    combination exists.
    """
    split = {tuple(re.split(r"(\d+)", name)): 1 for name in names}
    width = len(next(iter(split)))
    for column in range(width - 2, 0, -2):  # numbers are at the odd indices
        merged: dict[tuple, dict[str, int]] = {}
        for parts, count in split.items():
            merged.setdefault((parts[:column], count, parts[column + 1 :]), {})[parts[column]] = count
        split = {
            (*before, _spans(numbers), *after): sum(numbers.values())
            for (before, _, after), numbers in merged.items()
        }
    return [("".join(parts), count) for parts, count in split.items()]


def _spans(numbers: Iterable[str]) -> str:
    """Different numbers as text: "{0-29}", "{0,2-3}"; a single one unchanged."""
    numbers = sorted(numbers, key=lambda number: (int(number), number))
    if len(numbers) == 1:
        return numbers[0]
    spans = []
    for number in numbers:
        is_next = spans and str(int(spans[-1][1]) + 1) == number and str(int(spans[-1][1])) == spans[-1][1]
        if is_next:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(low if low == high else f"{low}-{high}" for low, high in spans) + "}"
