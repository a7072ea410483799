"""Layers that read one tensor one after the other (q/k/v, gate/up) run as one operator, `mica.ops.group`.

Groups are not recognised by names but observed: consecutive calls with one x make a group, and from then on
the first call computes the outputs of all. The others fetch theirs if nothing that their result depends on
has changed, and otherwise compute as if there were no group: a changed order of calls costs time but is never
wrong. (An edit that autograd would not notice, through ``.data``, is not noticed here.)

Gradient checkpointing compares what a forward saved with what its recomputation saves. A layer saves the same
at its own call, whether it is grouped or not (`group.start_group`). So each call may decide anew,
whatever was learnt or has changed between a forward and its recomputation. A group does not cross the
boundary of a checkpointed region: a recomputation would compute for layers that it does not call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from mica import backend
from mica.fast.forward import fast_check
from mica.fast.forward.eligibility import Operands, adapters_for, depends_on_call, fused_operands
from mica.fast.settings import settings
from mica.kernels.limits import MAX_RANK
from mica.ops.dispatch import is_transformed
from mica.ops.group import stacked_rank

# Tokens x in_features² from which "auto" groups. Below, a step takes as long as the host needs, and there
# layers cost more in a group than alone (a whole decoder block of tiny tensors 1.2 times). MODELLED: an H100
# needs 170 µs for the two products of a square layer of this size, as long as the host for all of a layer. It
# depends on x alone, since all layers that read x have to agree.
_WORTH_GROUPING = 2**35

# After this many consecutive calls whose outputs were not all fetched, the group keeps the layers that did.
_MISSES = 2


@dataclass
class _Group:
    """The layers of a run, led by the first."""

    layers: list[ReferenceType[nn.Module]]
    misses: int = 0

    def miss(self, unfetched: dict[nn.Module, _Output | None]) -> None:
        self.misses += 1
        if self.misses >= _MISSES:
            self.layers = [layer for layer in self.layers if layer() not in unfetched]
            self.misses = 0


@dataclass
class _Run:
    """Consecutive calls of layers with one x, as observed so far."""

    x: TensorWeakRef
    version: int
    region: int | None
    layers: list[ReferenceType[nn.Module]]
    is_simple: bool = True  # no layer twice


@dataclass(eq=False)
class _Output:
    """One layer's output, computed ahead, and the operands that it was computed from."""

    call: Callable[[], Tensor]
    operands: Operands
    versions: tuple


@dataclass(eq=False)
class _Pending:
    """Outputs that the first call of a group has computed for the others; None where one was released."""

    x: TensorWeakRef
    surroundings: tuple
    group: _Group
    outputs: dict[nn.Module, _Output | None]


class _State(threading.local):
    run: _Run | None = None
    pending: _Pending | None = None


state = _State()
groups: WeakKeyDictionary[nn.Module, _Group] = WeakKeyDictionary()


def is_on(x: Tensor, lora_A: Tensor) -> bool:
    """Whether calls with this x are observed and grouped: in training, where the setting says so.

    "auto": where the operators run on kernels and x is large. On the CPU the gain of 1 to 4 % of a
    block lies within the spread of the measurement (bench_block).
    """
    choice = settings.group_projections
    if not choice or (choice == "auto" and not x.is_cuda):
        return False
    if choice == "auto" and x.numel() * x.shape[-1] < _WORTH_GROUPING:
        return False
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_inference():
        return False
    if is_transformed():
        return False
    # Selective checkpointing, a dispatch mode, expects a recomputation to run the operators of its forward.
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return choice != "auto" or backend.use_kernels(x.device, lora_A.shape[0], x.dtype, lora_A.dtype)


def _region() -> int | None:
    """Identifies the hooks on tensors saved now (a checkpointed region, offloading); None outside of any."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else id(hooks[0])


def output(
    layer: nn.Module,
    x: Tensor,
    operands: Operands,
    alone: Callable[[nn.Module, Tensor, Operands], Tensor],
    together: Callable[[list[nn.Module], Tensor, list[Operands]], list],
) -> Tensor:
    """The output of a layer that runs fused on x, without dropout: fetched, or computed in a group or alone.

    ``together`` computes for several layers that read x, and returns what `group.start_group` does.
    """
    call = _fetch(layer, x, operands)
    if call is None:
        members = _members(layer, x, operands)
        if members is None:
            result = alone(layer, x, operands)
            _observe(layer, x, result)
            return result
        result, *calls = together(list(members), x, list(members.values()))
        _keep(members, x, result, calls)
        return result
    # Last of all: a recomputation ends with an exception, raised where a tensor is saved.
    return call()


def _fetch(layer: nn.Module, x: Tensor, operands: Operands) -> Callable[[], Tensor] | None:
    """This layer's call, if the first of its group has computed exactly this one from this very x."""
    pending = state.pending
    if pending is None:
        return None
    output = pending.outputs.get(layer)
    if (
        output is None
        or pending.x() is not x
        or pending.surroundings != surroundings(x)
        or not all(map(is_, output.operands, operands))
        or output.versions != _versions(output.operands)
    ):
        pending.group.miss(pending.outputs)
        forget_pending()
        return None
    del pending.outputs[layer]
    if not pending.outputs:
        state.pending = None
        pending.group.misses = 0
    return output.call


def surroundings(x: Tensor) -> tuple:
    """What the result of a layer depends on in addition to its operands."""
    device = x.device
    kind = device.type
    return (
        x._version,
        x.data_ptr(),
        x.requires_grad,
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        settings.compute_dtype,
        _region(),
        # another stream's values may not have been computed yet
        torch._C._cuda_getCurrentRawStream(device.index) if kind == "cuda" else None,
    )


def _versions(operands: tuple) -> tuple:
    return tuple(
        (None if operand.is_inference() else operand._version, operand.data_ptr(), operand.requires_grad)
        for operand in operands
        if isinstance(operand, Tensor)
    )


def _members(layer: nn.Module, x: Tensor, operands: Operands) -> dict[nn.Module, Operands] | None:
    """The layers of the group that this one leads, and their operands; None where it runs alone.

    Each must run fused on x, with one adapter and no dropout, and nothing may depend on its being called.
    """
    group = groups.get(layer)
    if group is None or len(group.layers) == 1:
        return None
    members = {}
    for reference in group.layers:
        member = reference()
        if member is None or depends_on_call(member):
            return None
        if members:
            operands = fast_check.operands(member, x) or _operands_in_general(member, x)
        if operands is None or operands.lora_A.device != x.device:
            return None
        if not operands.lora_A.requires_grad:  # its output need not require a gradient, but a group's would
            return None
        members[member] = operands
    rank = stacked_rank([operands.lora_A for operands in members.values()])
    return members if rank <= MAX_RANK else None


def _operands_in_general(layer: nn.Module, x: Tensor) -> Operands | None:
    adapters = adapters_for(layer, x)
    if type(adapters) is str or len(adapters) > 1 or adapters[0].dropout_p:
        return None
    return fused_operands(layer, x, adapters[0])


def _keep(members: dict[nn.Module, Operands], x: Tensor, first: Tensor, calls: list) -> None:
    """``calls`` of the layers after the first, whose output is ``first``, until they are called."""
    (leader, _), *others = members.items()
    outputs = {
        layer: _Output(call, operands, _versions(operands))
        for (layer, operands), call in zip(others, calls, strict=True)
    }
    pending = _Pending(TensorWeakRef(x), surroundings(x), groups[leader], outputs)
    # Outputs that are never fetched keep the graph alive; its backward releases them at the latest, or the
    # backward for which this is a recomputation.
    release = _releasing(ref(pending))
    first.grad_fn.on_backward = release
    if torch._C._current_graph_task_id() != -1:
        torch.autograd.Variable._execution_engine.queue_callback(release)
    state.run, state.pending = None, pending


def _releasing(pending: ReferenceType[_Pending]):
    def release() -> None:
        waiting = pending()
        if waiting is not None:
            waiting.outputs = dict.fromkeys(waiting.outputs)

    return release


def _observe(layer: nn.Module, x: Tensor, output: Tensor) -> None:
    """After a call that ran alone: has it read the same x as the calls before it?"""
    if output.grad_fn is None:
        return
    run, here = state.run, _region()
    if run is not None and run.x() is x and run.version == x._version and run.region == here:
        run.is_simple = run.is_simple and all(reference() is not layer for reference in run.layers)
        run.layers.append(ref(layer))
        return
    if run is not None:
        _learn(run)
    state.run = _Run(TensorWeakRef(x), x._version, here, [ref(layer)])


def _learn(run: _Run) -> None:
    leader = run.layers[0]()
    if leader is not None and leader not in groups and run.is_simple and len(run.layers) > 1:
        groups[leader] = _Group(run.layers)


def forget_pending() -> None:
    """Release outputs that were computed ahead: after a forward, also one that raised."""
    if state.pending is not None:
        state.pending.outputs.clear()
        state.pending = None
