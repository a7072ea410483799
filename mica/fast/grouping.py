"""Layers that read one tensor one after the other (q/k/v, gate/up) run as one operator, `mica.group_ops`.

Which ones do is not known from their names but seen: a run of calls with one x makes a group, and from then
on the first call computes the outputs of all. The others fetch theirs where everything that their result
depends on is as it was then, and else compute as if there were no group: an order of calls that changes
costs time and is never wrong. (An edit that autograd would not see, through ``.data``, is not seen here.)

Gradient checkpointing compares what a forward saved with what its recomputation saves. A layer saves the same
at its own call, whether it is grouped or not (`group_ops.start_group`). So that may be decided anew at each
call, whatever was learnt or has changed between a forward and its recomputation. A group does not reach over
the edge of a checkpointed region: a recomputation would compute for layers that it does not call.
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
from mica.dispatch import is_transformed
from mica.fast import common_case
from mica.fast.eligibility import Operands, adapters_for, fused_operands, hangs_on_call
from mica.fast.settings import settings
from mica.group_ops import stacked_rank

# Tokens x in_features² from which "auto" groups. Below, the host decides how long a step takes, and there
# layers cost more in a group than alone (a whole decoder block of tiny tensors 1.2 times). MODELLED: an H100
# needs 170 µs for the two products of a square layer of this size, as long as the host for all of a layer. It
# hangs on x alone, for all that read it have to agree.
_WORTH_GROUPING = 2**35

# Calls in a row whose outputs were not all fetched: the group shrinks to the layers that did fetch theirs.
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
    """Calls of layers with one x, as they are being seen."""

    x: TensorWeakRef
    version: int
    region: int | None
    layers: list[ReferenceType[nn.Module]]
    is_simple: bool = True  # no layer twice


@dataclass(eq=False)
class _Output:
    """Of one layer, computed ahead, and the operands that it was computed from."""

    call: Callable[[], Tensor]
    operands: Operands
    versions: tuple


@dataclass(eq=False)
class _Pending:
    """Outputs that the first call of a group has computed for the others; None where one is let go of."""

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
    """Whether calls with this x are watched and grouped: in training, where the setting says so.

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
    # Selective checkpointing, a dispatch mode, looks for the operators of a forward in its recomputation.
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return choice != "auto" or backend.use_kernels(x.device, lora_A.shape[0], x.dtype, lora_A.dtype)


def _region() -> int | None:
    """Of what hooks the tensors that are saved now: of a checkpointed region, or offloading; None outside."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else id(hooks[0])


def output(
    layer: nn.Module,
    x: Tensor,
    operands: Operands,
    alone: Callable[[nn.Module, Tensor, Operands], Tensor],
    together: Callable[[list[nn.Module], Tensor, list[Operands]], list],
) -> Tensor:
    """Of a layer that runs fused on x, without dropout; ``alone`` computes it.

    ``together`` computes those of several layers that read x, and returns what `group_ops.start_group` does.
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
    # The last thing done: the end of a recomputation is an exception that saving a tensor raises.
    return call()


def _fetch(layer: nn.Module, x: Tensor, operands: Operands) -> Callable[[], Tensor] | None:
    """The call of this layer, if the first of its group has computed just this one from this very x."""
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
    """What the result of a layer depends on beside its operands."""
    device = x.device
    kind = device.type
    return (
        x._version,
        x.data_ptr(),
        x.requires_grad,
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        settings.compute_dtype,
        _region(),
        # values of another stream may not be there yet
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
        if member is None or hangs_on_call(member):
            return None
        if members:
            operands = common_case.operands(member, x) or _operands_in_general(member, x)
        if operands is None or operands.lora_A.device != x.device:
            return None
        if not operands.lora_A.requires_grad:  # its output need not require a gradient, but a group's would
            return None
        members[member] = operands
    rank = stacked_rank([operands.lora_A for operands in members.values()])
    return members if rank <= backend.MAX_RANK else None


def _operands_in_general(layer: nn.Module, x: Tensor) -> Operands | None:
    adapters = adapters_for(layer, x)
    if adapters is None or len(adapters) > 1 or adapters[0].dropout_p:
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
    # Outputs that nobody fetched hold the graph; at the latest its backward lets go of them, or the backward
    # for which this is a recomputation.
    release = _releasing(ref(pending))
    first.grad_fn.on_backward = release
    if torch._C._current_graph_task_id() != -1:
        torch.autograd.Variable._execution_engine.queue_callback(release)
    state.run, state.pending = None, pending


def _releasing(pending: ReferenceType[_Pending]):
    def release() -> None:
        found = pending()
        if found is not None:
            found.outputs = dict.fromkeys(found.outputs)

    return release


def _observe(layer: nn.Module, x: Tensor, output: Tensor) -> None:
    """A call that ran alone: does it go on reading what the calls before it have read?"""
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
    """Let go of outputs that were computed ahead: after a forward, also one that ended in an exception."""
    if state.pending is not None:
        state.pending.outputs.clear()
        state.pending = None
