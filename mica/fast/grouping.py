"""Layers that read one tensor one after the other (q/k/v, gate/up) run as one operator, `mica.group_ops`.

Which ones do is not known from their names but seen: a run of calls with one x makes a group, and from then
on the first call computes the outputs of all. The others fetch theirs, or compute as if there were no group:
an order of calls that changes costs time and is never wrong.

Gradient checkpointing compares what a forward saved with what its recomputation saves, so a layer must not
go over to a group, or back, while the graph of an earlier call may still be recomputed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from mica import backend
from mica.dispatch import is_transformed
from mica.fast.settings import settings

# Outputs that were computed ahead and then not fetched, this often in a row: the group is given up.
_MISSES = 2


@dataclass
class _Group:
    """The layers of a run, led by the first. ``nodes``: of the graphs of its calls, in the present form."""

    layers: list[ReferenceType[nn.Module]]
    active: bool = False
    misses: int = 0
    nodes: list[ReferenceType] = field(default_factory=list)

    def decide(self) -> bool:
        """Whether the call that begins now is grouped."""
        self.nodes = [node for node in self.nodes if _may_be_recomputed(node)]
        wanted = self.misses < _MISSES
        if not self.nodes:
            self.active = wanted
        return self.active


@dataclass
class _Run:
    """Calls of layers with one x, as they are being seen."""

    x: TensorWeakRef
    version: int
    layers: list[ReferenceType[nn.Module]]
    node: ReferenceType
    is_simple: bool = True  # no layer twice


@dataclass(eq=False)
class _Pending:
    """Outputs that the first call of a group has computed for the others."""

    x: TensorWeakRef
    version: int
    group: _Group
    outputs: dict[nn.Module, Tensor]
    in_backward: bool

    def belongs_to(self, x: Tensor) -> bool:
        return self.x() is x and self.version == x._version


class _State(threading.local):
    run: _Run | None = None
    pending: _Pending | None = None


_state = _State()
_groups: WeakKeyDictionary[nn.Module, _Group] = WeakKeyDictionary()


def is_on(x: Tensor, lora_A: Tensor) -> bool:
    """Whether calls with this x are watched and grouped: in training, where the setting says so.

    "auto": where the operators run on kernels. On the CPU the gain of 1 to 4 % of a block lies within the
    spread of the measurement (bench_block).
    """
    choice = settings.group_projections
    if not choice or torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_inference():
        return False
    if is_transformed():
        return False
    if choice == "auto":
        return x.is_cuda and not backend.why_not_kernels(x.device, lora_A.shape[0], x.dtype, lora_A.dtype)
    return True


def fetch(layer: nn.Module, x: Tensor) -> Tensor | None:
    """This layer's output, if the first of its group has computed it from this very x."""
    pending = _state.pending
    if pending is None:
        return None
    if not pending.belongs_to(x) or layer not in pending.outputs:
        forget_pending()
        # In a backward a recomputation ends where its last saved tensor is there again.
        pending.group.misses += not pending.in_backward
        return None
    output = pending.outputs.pop(layer)
    if not pending.outputs:
        _state.pending = None
        pending.group.misses = 0
    return output


def members(layer: nn.Module) -> list[nn.Module] | None:
    """The layers to be computed with this one, which comes first; None where it runs alone."""
    group = _groups.get(layer)
    if group is None or not group.decide():
        return None
    layers = [reference() for reference in group.layers]
    return None if None in layers else layers


def lead(layers: list[nn.Module], x: Tensor, outputs: list[Tensor]) -> Tensor:
    """Keep the outputs of the group for the calls to come; the first is returned."""
    group, node = _groups[layers[0]], outputs[0].grad_fn
    others = dict(zip(layers[1:], outputs[1:], strict=True))
    in_backward = torch._C._current_graph_task_id() != -1
    pending = _Pending(TensorWeakRef(x), x._version, group, others, in_backward)
    if node is not None:
        group.nodes.append(ref(node))
        # Outputs that nobody fetched hold the graph; at the latest its backward lets go of them.
        node.on_backward = _releasing(ref(pending))
    _state.run, _state.pending = None, pending
    return outputs[0]


def _releasing(pending: ReferenceType[_Pending]):
    def release() -> None:
        found = pending()
        if found is not None:
            found.outputs.clear()

    return release


def observe(layer: nn.Module, x: Tensor, output: Tensor) -> None:
    """A call that ran alone: does it go on reading what the calls before it have read?"""
    node = output.grad_fn
    if node is None:
        return
    run = _state.run
    if run is not None and run.x() is x and run.version == x._version:
        run.is_simple = run.is_simple and all(reference() is not layer for reference in run.layers)
        run.layers.append(ref(layer))
        return
    if run is not None:
        _learn(run)
    group = _groups.get(layer)
    if group is not None:
        group.nodes.append(ref(node))
    _state.run = _Run(TensorWeakRef(x), x._version, [ref(layer)], ref(node))


def _learn(run: _Run) -> None:
    leader = run.layers[0]()
    if leader is None:
        return
    group = _groups.get(leader)
    if not run.is_simple or len(run.layers) == 1:
        return
    if group is None:
        _groups[leader] = _Group(run.layers, nodes=[run.node])
    elif not group.active:
        group.layers = run.layers


def _may_be_recomputed(node: ReferenceType) -> bool:
    found = node()
    return found is not None and not getattr(found, "done", False)


def forget_pending() -> None:
    """Let go of outputs that were computed ahead: after a forward, also one that ended in an exception."""
    if _state.pending is not None:
        _state.pending.outputs.clear()
        _state.pending = None


def whole_forward(stock):
    """Of PEFT's model or its tuner: one of them is around every forward of the whole model."""

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return stock(self, *args, **kwargs)
        try:
            return stock(self, *args, **kwargs)
        finally:
            forget_pending()

    return forward
