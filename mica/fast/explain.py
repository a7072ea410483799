"""`explain`: which path each adapted layer takes, and why where it is not this backend's."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mica.fast import checkpointing, known_peft, patching
from mica.fast.forward import decide, expert_params, experts, layer_calls
from mica.fast.forward.eligibility import (
    KERNEL,
    PEFT,
    REFERENCE,
    OnOperators,
    OnPeft,
    adapters_of,
    class_of,
    is_mica,
    quantised_layers,
)
from mica.fast.forward.layer_calls import Calls
from mica.fast.frameworks import REMEDIES, replaced_by
from mica.fast.merge.reporting import kind_merged_into
from mica.fast.refusals import check_model
from mica.fast.settings import settings
from mica.kernels.runtime import ON_A_CPU

_COVERED = (lora.Linear, lora.Embedding, expert_params.ParamWrapper)
_HEADER = ("layer", "base", "adapter", "path", "calls", "reason")
_LONG = 40  # characters of a reason: one that several lines share stands below the table


@dataclass(frozen=True)
class Row:
    """What `explain` says of one adapted layer.

    Attributes:
        name: The layer's name in the model; of an adapted parameter, that of the parameter.
        layer: The name of the base layer's class.
        adapter: The names of those of the active adapters that the layer has.
        path: "kernel", "reference", "peft" or "error".
        reason: Why the path is not the one before it in that list, and why the base layer is called, if it
            is.
        calls: How often the layer has been called since an adapter was last added; None if unknown.
        bypassed_by: The framework or module whose code runs instead of the layer's; None if there is none.
    """

    name: str
    layer: str
    adapter: str
    path: str
    reason: str
    calls: int | None = None
    bypassed_by: str | None = None


@dataclass(frozen=True)
class Explanation:
    """The path table: ``str()`` prints it, with equal rows as one.

    Attributes:
        rows: One `Row` for each adapted layer, in the order of the layers.
        checkpointed: How many modules around adapted layers have gradient checkpointing on.
        by_memory: Lines that say how many of them are checkpointed, where that is chosen by batch.
    """

    rows: list[Row] = field(default_factory=list)
    checkpointed: int = 0
    by_memory: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many layers take each path, for instance {"kernel": 210}."""
        return dict(Counter(row.path for row in self.rows))

    def totals(self) -> str:
        """How many layers there are, and how many take each path: the line below the table."""
        paths = Counter(_shown(row).path for row in self.rows)
        parts = [", ".join(f"{count} {path}" for path, count in paths.items())]
        uncalled = sum(row.calls == 0 for row in self.rows)
        if uncalled:
            parts.append(f"{uncalled} not called")
        return f"{len(self.rows)} layer{'s' if len(self.rows) > 1 else ''}: {'; '.join(parts)}"

    def __str__(self) -> str:
        return _text(self)


def explain(model: nn.Module) -> Explanation:
    """The path that each adapted layer of the model takes in its current state.

    Path "kernel": the fused operators on Triton kernels; "reference": the reference path, with the reason why
    kernels do not run; "peft": PEFT's own code, with the reason; "error": MICA_BACKEND=triton demands kernels
    that do not exist for this layer, and a call raises. A base layer whose weight cannot be read directly is
    called, the reason says why, and only the adapter runs on the operators. Weights that FSDP2 has sharded
    with a module around the layer count as the plain tensors that they are while that module's forward runs.

    What only a call can show (tokens, dtype and strides of the activations, autocast, other arguments) comes
    from the layer's last call with the backend on. A layer whose adapter PEFT's code ran then has the path
    "peft", and its reason names that call. Before the first call the table is about what holds for any call.
    The backward is taken to get a contiguous gradient.

    ``calls`` of a row: how often the layer was called, on any path, with the backend on, since an adapter was
    last added to any model; calls that a backward makes again do not count. 0: the model has been called and
    this layer has not, as something bypasses it, like a framework that has replaced the forward of the module
    around it, or a loss that reads the head's weight. None if unknown: before the first call, for layers that
    are not covered, and once torch.compile has traced a MiCA layer.

    ``bypassed_by``: where other code runs instead of the layer, the framework's name (axolotl, unsloth) or
    that of the module with the code; ``str()`` says how to switch it off.

    ``checkpointed``: how many modules with adapted layers transformers or torch's ``CheckpointWrapper``
    checkpoints, whose activations are discarded on any path; ``str()`` says so in its last line. A function
    that calls `torch.utils.checkpoint` itself is not seen. ``by_memory`` says in how many layers
    batches did so with ``mica.fast.enable(memory=…)``, and what a step took.

    Raises:
        TypeError: ``model`` is not a `torch.nn.Module`.
    """
    check_model(model, "explain")
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    calls = layer_calls.calls_of(modules.values())
    rows = [_row(model, name, module, modules, calls) for name, module in layers.items()]
    return Explanation(rows, _checkpointed(modules, layers), checkpointing.report(model))


def _row(
    model: nn.Module,
    name: str,
    module: BaseTunerLayer,
    modules: dict[str, nn.Module],
    calls: dict[nn.Module, Calls],
) -> Row:
    outermost = module
    shown = name
    if expert_params.is_wrapper(module):
        name, outermost = _outermost_wrapper(name, module, modules)
        shown = f"{name}.{module.parameter_name}"

    own = calls.get(module, Calls())
    with _as_gathered(model, name, outermost):
        count = own.count if calls and _is_counted(module) else None
        bypassed_by = None
        if count == 0:
            called = [other for other, layer in modules.items() if calls[layer].count]
            bypassed_by = _bypassed_by(modules, name, called)
        path, reason = _decided(module, outermost).explained(own.x)
    kind = kind_merged_into(module)
    if kind is not None:
        reason = f"{reason} ({kind}), whose rounding was not measured"
    why_peft = calls.get(outermost, Calls()).why_peft
    if path in (KERNEL, REFERENCE) and why_peft:
        path = PEFT
        reason = f"in its last call: {why_peft}"
    base = type(module.get_base_layer()).__name__
    return Row(shown, base, _adapters(module), path, reason, count, bypassed_by or replaced_by(module))


def _outermost_wrapper(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, nn.Module]:
    """The first wrapper that computes, and the name of all: those of parameters of one module are nested."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    outermost = modules[name]
    while outermost is not module and outermost.merged:  # it only calls the next
        outermost = outermost.base_layer
    return name, outermost


def _is_counted(module: nn.Module) -> bool:
    is_covered = class_of(module) in _COVERED or class_of(module) in quantised_layers
    return is_covered and _why_not_entered(module) is None


@contextmanager
def _as_gathered(model: nn.Module, name: str, layer: nn.Module) -> Iterator[None]:
    """Plain shards in place of the weights that FSDP2 gathers before this layer is called."""
    parents = [model.get_submodule(name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1)]
    replaced = []
    if any(class_of(module) is not type(module) for module in (model, layer, *parents)):  # a unit of FSDP2
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


def _adapters(layer) -> str:
    names = adapters_of(layer) if isinstance(layer, lora.LoraLayer) else layer.active_adapters
    return ", ".join(f"{name} (MiCA)" if is_mica(layer, name) else name for name in names)


def _decided(layer, outermost) -> OnPeft | OnOperators:
    """What decides about a call; ``outermost``: of wrappers nested around one module, else the layer."""
    if reason := _why_not_entered(layer) or (None if settings.enabled else "mica.fast is disabled"):
        return OnPeft(reason)
    if expert_params.is_wrapper(layer):
        return experts.decide_one(layer, outermost)
    return decide.decide(layer)


def _why_not_entered(layer) -> str | None:
    """Why a call of the layer does not pass through this backend's forward, if it does not."""
    if not patching.is_installed():
        return "mica.fast is not installed"
    if who := replaced_by(layer):
        return f"{who} has replaced the layer's forward"
    if reasons := known_peft.left.get(_part_of(layer)):
        return f"left to PEFT, because {'; '.join(reasons)}"
    of_class = getattr(getattr(layer, "_old_forward", None), "__func__", None) is type(layer).forward
    if "forward" in vars(layer) and not of_class:
        return "the layer has a forward of its own, set before mica.fast was imported"
    return None


def _part_of(layer) -> str | None:
    """The part of the backend that the layer's forward is; None of a class over quantised weights."""
    if expert_params.is_wrapper(layer):
        return known_peft.EXPERTS
    kind = class_of(layer)
    if kind is lora.Embedding:
        return known_peft.EMBEDDING
    is_linear = kind.forward is lora.Linear.forward  # torchao's inherits it
    return known_peft.LINEAR if is_linear else None


# ---------------------------------------------------------------------------------------------------
# who computes something in this backend's place
# ---------------------------------------------------------------------------------------------------


def _bypassed_by(modules: Mapping[str, nn.Module], name: str, called: list[str]) -> str | None:
    """Who replaced a forward around the layer ``name``, which was not called; None if nobody is found.

    A module around a layer that was ``called`` has been entered. What is around that one cannot be why.
    """
    while True:
        if name in modules and (who := replaced_by(modules[name])):
            return who
        if not name or any(other.startswith(f"{name}.") for other in called):
            return None
        name = name.rpartition(".")[0]


def _checkpointed(modules: Mapping[str, nn.Module], layers: Collection[str]) -> int:
    """How many of the modules that hold adapted layers are checkpointed."""
    count = 0
    for name, module in modules.items():
        is_wrapper = "checkpoint_fn" in vars(module)  # torch's CheckpointWrapper
        is_flagged = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        if is_wrapper or is_flagged:
            count += any(layer.startswith(f"{name}.") for layer in layers)
    return count


# ---------------------------------------------------------------------------------------------------
# the table as text
# ---------------------------------------------------------------------------------------------------


def _text(explanation: Explanation) -> str:
    """Aligned lines in the order of the layers, one for all equal rows; the long reasons, and the totals."""
    rows = [_shown(row) for row in explanation.rows]
    if not rows:
        return "no adapted layers"
    equal: dict[Row, list[str]] = {}
    for row in rows:
        numberless = re.sub(r"\d+", "#", row.name)
        equal.setdefault(replace(row, name=numberless), []).append(row.name)
    shared = Counter(row.reason for row in equal)
    notes = [reason for reason, count in shared.items() if count > 1 and len(reason) > _LONG]

    lines = [_HEADER]
    for row, names in equal.items():
        reason = row.reason
        if reason in notes:
            reason = f"[{notes.index(reason) + 1}]"
        bypass = f"bypassed by {row.bypassed_by}" if row.calls == 0 and row.bypassed_by else ""
        calls = "-" if row.calls is None else str(row.calls)
        cells = row.layer, row.adapter, row.path, calls, "; ".join(filter(None, (reason, bypass)))
        for pattern, count in patterns(names):
            lines.append((pattern + (f"  ×{count}" if count > 1 else ""), *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    printed = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    printed += [f"[{number}] {reason}" for number, reason in enumerate(notes, 1)]
    printed += [explanation.totals(), *_bypasses(rows)]
    if explanation.by_memory:
        printed += explanation.by_memory
    elif count := explanation.checkpointed:
        where = f"in {count} layer{'s' if count > 1 else ''}"
        advice = 'mica.fast.enable(memory="auto") has each batch checkpoint as few layers as it needs'
        printed.append(
            f"gradient checkpointing is on {where}: what this backend saves is discarded there; {advice}"
        )
    return "\n".join(printed)


def _shown(row: Row) -> Row:
    """The row in the table: on a CPU the reference path is the fast one, and nothing to look into."""
    if row.path != REFERENCE or not row.reason.startswith(ON_A_CPU):
        return row
    reason = row.reason.removeprefix(ON_A_CPU).removeprefix("; ")
    return replace(row, path="operators (CPU)", reason=reason)


def _bypasses(rows) -> Iterator[str]:
    """A line for each framework, or other module, whose code runs instead of layers."""
    for who, count in Counter(row.bypassed_by for row in rows if row.bypassed_by).items():
        remedy = f": {REMEDIES[who]}" if who in REMEDIES else ""
        yield f"{who} bypasses {count} layer{'s' if count > 1 else ''}{remedy}"


def patterns(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Names that differ only in numbers -> patterns that match these and no others, and how many each.

    "h.0.fc", "h.1.fc", "h.3.fc" -> ("h.{0-1,3}.fc", 3). Two numbers become one pattern only where every
    combination exists; else there is one for each value of the first.
    """
    split = {name: re.split(r"(\d+)", name) for name in names}
    columns = [set(parts) for parts in zip(*split.values(), strict=True)]
    if math.prod(map(len, columns)) == len(names):
        yield "".join(map(_spans, columns)), len(names)
        return
    first = next(index for index, parts in enumerate(columns) if len(parts) > 1)
    groups = defaultdict(list)
    for name, parts in split.items():
        groups[parts[first]].append(name)
    for group in groups.values():
        yield from patterns(group)


def _spans(parts: set[str]) -> str:
    """Different numbers as text: "{0-29}", "{0,2-3}"; the same of all unchanged."""
    if len(parts) == 1:
        return parts.pop()
    numbers = sorted(map(int, parts))
    # numbers that follow one another differ from their places by the same
    runs = groupby(enumerate(numbers), lambda item: item[1] - item[0])
    spans = [[number for _, number in run] for _, run in runs]
    return "{" + ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans) + "}"
