"""Gradient checkpointing of as few layers as each batch needs to fit a budget of memory.

A layer of transformers hands its forward to the function that ``gradient_checkpointing_enable`` has given it.
A descriptor in that attribute's place gives another one, which in some layers calls the forward itself: so
only what somebody checkpoints is chosen from, and neither evaluation nor generation is touched. The first
layers are checkpointed: their backward comes when the others' memory is free again.

What a layer keeps is counted once for each kind of layer and a few lengths, on fake tensors: before the bytes
are needed, for any base, and with no effect on what is computed. What else is on the device its allocator
says; on a CPU, which has none that does, the tensors that Python can see are added up.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from mica.counting import Alive, held
from mica.fast.settings import AUTO, settings
from mica.memory import has_no_values

GIB = 2**30
MARGIN = 0.05  # of a device that "auto" leaves free: its allocator rounds, and workspaces are not counted
_STATES = 2  # numbers that Adam keeps of each that is trained
_CAREFUL = 1.1  # what is counted becomes so many times as much when memory runs out nevertheless
# Bytes for a number that the model returns: its loss keeps a copy and log-probabilities in 32 bits, and its
# backward two gradients
_LOSS = 16
_NAME = "_gradient_checkpointing_func"
_FSDP2 = "__composable_api"  # how attributes begin in which it keeps process groups
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Cost(NamedTuple):
    """Bytes that a layer allocates, above what was there before its forward."""

    kept: float  # after the forward, for the backward: its output, too
    peak: float  # at any time of its forward and backward, with what is kept


class Curve:
    """What a layer takes by the length of a sequence, from the lengths that were counted.

    No less than it does where that is a polynomial of the second degree without negative coefficients, as
    eager attention's is.
    """

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._costs: list[Cost] = []

    def lacks(self, length: int) -> bool:
        """Whether this length should be counted: it is outside of those that were, or far from both sides."""
        index = bisect_left(self._lengths, length)
        if index == len(self._lengths) or index == 0:
            return self._lengths[index : index + 1] != [length]
        return self._lengths[index] != length and self._lengths[index] > 2 * self._lengths[index - 1]

    def add(self, length: int, cost: Cost) -> None:
        index = bisect_left(self._lengths, length)
        self._lengths.insert(index, length)
        self._costs.insert(index, cost)

    def at(self, length: int) -> Cost:
        index = bisect_left(self._lengths, length)
        if index == len(self._lengths):
            growth = (length / self._lengths[-1]) ** 2
            return Cost(*(growth * value for value in self._costs[-1]))
        above = self._costs[index]
        if index == 0:
            return above
        low, high = self._lengths[index - 1 : index + 1]
        share = (length - low) / (high - low)
        return Cost(*(x + share * (y - x) for x, y in zip(self._costs[index - 1], above, strict=True)))


def peak(costs: list[Cost], number: int, h: int, rest: float) -> float:
    """Bytes that a step takes with its first ``number`` layers checkpointed.

    Args:
        costs: Those of the layers.
        number: How many are checkpointed; of these the input alone is kept.
        h: Bytes of a layer's input.
        rest: Bytes that what comes after the layers takes.
    """
    level = most = 0.0
    for index, cost in enumerate(costs):
        most = max(most, level + cost.peak + h)  # with the gradient of its output
        level += h if index < number else cost.kept
    return max(most, level + rest)


class Run:
    """Layers each of which takes what the one before has given, by the first: those of a decoder, say.

    Attributes:
        curves: For the shapes that the first layer gets, but for lengths, the `Curve` of each layer.
        rest: The most bytes that what follows the layers took, for each byte of a layer's input.
        is_followed: Whether a forward has begun before the backward of one of these: of a decoder after
            its encoder, or of several batches whose losses are added up. Then all layers are checkpointed.
        numbers: How many layers were checkpointed in the last batch, and the least and most so far.
        taken: The most bytes that a step takes, as counted, with what it found on the device.
        budget: Bytes that the last step might take.
    """

    def __init__(self) -> None:
        self.curves: dict[Hashable, list[Curve]] = {}
        self.rest = 1 + _LOSS / 2
        self.is_followed = False
        self.numbers: tuple[int, int, int] | None = None
        self.taken = self.budget = 0.0
        self._kinds: dict[Hashable, Curve] = {}

    def curve_of(self, layer: nn.Module, shapes: Hashable) -> Curve:
        """That of all layers of this kind."""
        return self._kinds.setdefault((type(layer), repr(layer), shapes), Curve())

    def note(self, number: int) -> None:
        """So many layers are checkpointed in this batch."""
        _, least, most = self.numbers or (number, number, number)
        self.numbers = number, min(least, number), max(most, number)


class _Graph:
    """What a forward keeps: it is there until the backward has passed, or the graph is gone."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.bytes = 0.0

    def free(self, *_) -> None:
        _graphs.discard(self)


class _Forward:
    """One pass through the layers of a run.

    Attributes:
        number: How many of the layers are checkpointed.
        known: How many layers there are, as far as known; what comes after is checkpointed.
    """

    def __init__(self, run: Run, shapes: Hashable, x: Tensor) -> None:
        self.run = run
        self.graph = _Graph(run)
        self.curves = run.curves.setdefault(shapes, [])
        self.known = len(self.curves)
        self.number = self.known
        self.position = 0
        self.h = x.nbytes
        self.output = weakref.ref(x)


class _Thread(threading.local):
    forward: _Forward | None = None


_thread = _Thread()
_runs: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
_graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
_care = 1.0  # times what is counted
_is_uncounted = False  # a layer could not be counted
_has_stepped = False  # an optimizer has its states
_step_hook: RemovableHandle | None = None
_seen: dict[torch.device, tuple[int, list[weakref.ref[Tensor]]]] = {}


class GivenFunction:
    """The attribute in which a layer of transformers finds the function that checkpoints it."""

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        if layer is None:
            return self
        try:
            stock = vars(layer)[_NAME]
        except KeyError:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {_NAME!r}") from None
        if settings.memory is None or not settings.enabled or torch.compiler.is_compiling():
            return stock
        return partial(_run, layer, stock)

    def __set__(self, layer: nn.Module, function: Callable) -> None:
        vars(layer)[_NAME] = function

    def __delete__(self, layer: nn.Module) -> None:
        del vars(layer)[_NAME]


def install() -> None:
    """Have transformers' layers ask here, if `settings.memory` is set; nothing is known of any model."""
    global _step_hook
    if settings.memory is not None and _step_hook is None:
        setattr(GradientCheckpointingLayer, _NAME, GivenFunction())
        _step_hook = register_optimizer_step_post_hook(_note_step)
    forget()


def uninstall() -> None:
    """Give transformers' class back as it was."""
    global _step_hook
    if _step_hook is not None:
        delattr(GradientCheckpointingLayer, _NAME)
        _step_hook.remove()
        _step_hook = None
    forget()


def forget() -> None:
    """Layers have changed: count them anew."""
    global _care, _is_uncounted
    _thread.forward = None
    _runs.clear()
    _seen.clear()
    _care = 1.0
    _is_uncounted = False


def _note_step(*_) -> None:
    global _has_stepped
    if not _has_stepped:
        _has_stepped = True
        _seen.clear()  # the states are there now


def _run(layer: nn.Module, stock: Callable, function: Callable, *args) -> Any:
    """The layer's output; ``function(*args)`` is its forward, and ``stock`` checkpoints that."""
    kwargs = getattr(function, "keywords", {})
    x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if x is None or x.dim() < 2 or has_no_values(x):
        return stock(function, *args)

    length = x.shape[-2]
    shapes = _shapes(args, kwargs, length)
    forward = _thread.forward
    if forward is None or not _is_same(forward.output(), x):
        forward = _thread.forward = _begin(layer, shapes, x)
    if forward.position >= len(forward.curves):
        forward.curves.append(forward.run.curve_of(layer, shapes))
    curve = forward.curves[forward.position]
    if curve.lacks(length) and not _is_uncounted:
        _add(curve, length, layer, args, kwargs)
    if forward.position == 0:  # its curve now knows this length
        _choose(forward, length, x.device)
    is_left = forward.number <= forward.position < forward.known
    try:
        output = function(*args) if is_left else stock(function, *args)
    except torch.OutOfMemoryError as error:
        _explain(error, forward)
        raise
    _end(forward, curve, length, output, is_left)
    return output


def _begin(layer: nn.Module, shapes: Hashable, x: Tensor) -> _Forward:
    """A forward through a run of layers, of which the first is about to run."""
    _thread.forward = None
    for graph in list(_graphs):
        graph.run.is_followed = True
    return _Forward(_runs.setdefault(layer, Run()), shapes, x)


def _choose(forward: _Forward, length: int, device: torch.device) -> None:
    """Have as few layers checkpointed as fit the budget; all where layers are not known or counted yet."""
    if _is_uncounted or not forward.known:
        return
    run = forward.run
    budget, taken = _budget(device)
    costs = [curve.at(length) for curve in forward.curves]
    rest = run.rest * forward.h

    def total(number: int) -> float:
        return taken + _care * peak(costs, number, forward.h, rest)

    if not run.is_followed:
        numbers = range(forward.known)  # beyond them are all
        forward.number = bisect_left(numbers, True, key=lambda number: total(number) <= budget)
    counted = total(forward.number)
    if counted > budget >= run.taken:
        warnings.warn(
            f"memory: a step takes {counted / GIB:.2f} GiB, as counted, with {forward.number} of "
            f"{forward.known} layers checkpointed, and {budget / GIB:.2f} GiB were given.",
            stacklevel=2,
        )
    run.taken, run.budget = max(run.taken, counted), budget
    run.note(forward.number)


def _end(forward: _Forward, curve: Curve, length: int, output: Any, is_left: bool) -> None:
    """A layer has run."""
    h = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if h is None or not h.requires_grad:
        forward.output = weakref.ref(h) if h is not None else forward.output
        forward.position += 1
        return
    if not forward.graph.bytes:
        _graphs.add(forward.graph)
        h.register_hook(forward.graph.free)
    forward.graph.bytes += curve.at(length).kept if is_left else forward.h
    forward.output = weakref.ref(h)
    forward.position += 1


def note_output(output: Any) -> None:
    """What the model returns, whose loss comes after the layers that ran last."""
    forward, _thread.forward = _thread.forward, None
    if forward is None:
        return
    rest = sum(
        leaf.numel() * (leaf.element_size() + _LOSS)
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim()
    )
    forward.run.rest = max(forward.run.rest, rest / forward.h)


def _is_same(before: Tensor | None, x: Tensor) -> bool:
    """Whether a layer gets what the one before has given; FSDP2 gives it an alias."""
    return before is not None and before.data_ptr() == x.data_ptr() and before.shape == x.shape


def _explain(error: torch.OutOfMemoryError, forward: _Forward) -> None:
    global _care
    _care *= _CAREFUL
    run = forward.run
    error.args = (
        f"{error} mica.fast had {forward.number} of {forward.known} layers checkpointed to fit "
        f"{run.budget / GIB:.2f} GiB; from now on it expects a step to take {_CAREFUL:g} times as much.",
    )


# ---------------------------------------------------------------------------------------------------
# what a layer takes
# ---------------------------------------------------------------------------------------------------


def _shapes(args: tuple, kwargs: dict, length: int) -> Hashable:
    """What decides about a layer's memory in its operands but the length: a dimension of that size is -1."""

    def described(leaf: object) -> Hashable:
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, bool | None) else type(leaf)
        if leaf.dim() < 2 and not leaf.is_floating_point():  # where packed documents begin
            return leaf.dtype
        return leaf.dtype, leaf.requires_grad, tuple(-1 if size == length else size for size in leaf.shape)

    operands = tuple(described(leaf) for leaf in tree_leaves((args, kwargs)))
    return operands, _autocast_dtype(args)


def _autocast_dtype(args: tuple) -> torch.dtype | None:
    device = next((leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _add(curve: Curve, length: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
    """Count the layer at this length; where that cannot be done all layers are checkpointed from now on."""
    global _is_uncounted
    try:
        curve.add(length, count(layer, args, kwargs))
    except Exception as error:
        _is_uncounted = True
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            f"memory: what {type(layer).__name__} takes cannot be counted without values "
            f"({type(error).__name__}: {reason}), so all layers are checkpointed.",
            stacklevel=2,
        )


def count(layer: nn.Module, args: tuple, kwargs: dict) -> Cost:
    """What a forward of the layer allocates, and its backward; nothing is computed.

    Raises whatever an operation raises that needs values.
    """
    mode = FakeTensorMode()
    fake = _on_fakes(layer, mode)
    device = next(layer.parameters()).device.type
    dtype = torch.get_autocast_dtype(device)
    is_on = torch.is_autocast_enabled(device)
    args, kwargs = tree_map_only(
        Tensor, lambda x: mode.from_tensor(x.detach()).requires_grad_(x.requires_grad), (args, kwargs)
    )
    autocast = torch.autocast(device, dtype, is_on, cache_enabled=False)
    with mode, autocast, Alive() as alive:
        for tensor in (*held(fake), *tree_leaves((args, kwargs))):
            if isinstance(tensor, Tensor):
                alive.note(tensor)
        before = alive.peak = alive.bytes
        output = fake.forward(*args, **kwargs)
        kept = alive.bytes - before
        h = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if h.requires_grad:
            h.backward(torch.empty_like(h))
    return Cost(kept, alive.peak - before)


def _on_fakes(layer: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the layer without values, without checkpointing and without hooks of its own (FSDP2's)."""
    copied = object.__new__(type(layer))
    memo: dict[int, object] = {id(layer): copied}
    parameters = list(layer.parameters())
    for parameter in parameters:  # of bitsandbytes' class, too, which is no longer one without its values
        values = mode.from_tensor(parameter.detach().as_subclass(Tensor))
        memo[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    state = {
        name: value
        for name, value in vars(layer).items()
        if name not in (*_HOOKS, _NAME) and not name.startswith(_FSDP2)
    }
    with FakeCopyMode(mode):
        for parameter in parameters:
            if type(parameter) is not nn.Parameter:  # its scales
                vars(memo[id(parameter)]).update(copy.deepcopy(vars(parameter), memo))
        vars(copied).update(copy.deepcopy(state, memo))
    vars(copied).update({name: {} for name in _HOOKS}, gradient_checkpointing=False)
    return copied


# ---------------------------------------------------------------------------------------------------
# what there is
# ---------------------------------------------------------------------------------------------------


def _budget(device: torch.device) -> tuple[float, float]:
    """Bytes that a step may take of the device, and those that are taken before its layers run.

    The latter with gradients and an optimizer's states that are still to come.
    """
    taken, trained = _taken(device)
    to_come = sum(p.nbytes for p in trained if device.type == "cpu" or p.grad is None)
    if not _has_stepped:
        to_come += _STATES * sum(p.nbytes for p in trained)
    if settings.memory != AUTO:
        return settings.memory * GIB, taken + to_come
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return taken + memory.available - MARGIN * memory.total, taken + to_come
    free, total = torch.accelerator.get_memory_info(device)
    cached = torch.accelerator.memory_reserved(device) - taken
    return taken + free + cached - MARGIN * total, taken + to_come


def _taken(device: torch.device) -> tuple[float, list[Tensor]]:
    """Bytes of the device that are taken, on a CPU without gradients; and the trained parameters on it."""
    if device not in _seen:
        _seen[device] = _look(device)
    size, trained = _seen[device]
    if device.type == "cpu":
        size += sum(graph.bytes for graph in _graphs)
    else:
        size = torch.accelerator.memory_allocated(device)
    return size, [parameter for reference in trained if (parameter := reference()) is not None]


def _look(device: torch.device) -> tuple[int, list[weakref.ref[Tensor]]]:
    """Bytes of all tensors on this device that a step finds, but for gradients, and the trained parameters.

    By Python's garbage collector, which knows those of other models and of optimizers, too. What has a graph
    is of a step.
    """
    tensors = list(_leaves(device))
    gradients = {tensor.grad.untyped_storage()._cdata for tensor in tensors if tensor.grad is not None}
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    size = sum(size for key, size in storages.items() if key not in gradients)
    trained = [
        weakref.ref(tensor) for tensor in tensors if tensor.requires_grad and isinstance(tensor, nn.Parameter)
    ]
    return size, trained


def _leaves(device: torch.device) -> Iterator[Tensor]:
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and not has_no_values(found) and found.is_leaf:
            local = found.to_local() if hasattr(found, "to_local") else found
            if local.device == device and local.layout == torch.strided:
                yield found if local is found else local


# ---------------------------------------------------------------------------------------------------
# what it says
# ---------------------------------------------------------------------------------------------------


def report(model: nn.Module | None = None) -> list[str]:
    """A line for each run of layers, of this model or of all, of which some were chosen."""
    modules = None if model is None else set(model.modules())
    lines = []
    for layer, run in _runs.items():
        if run.numbers is None or (modules is not None and layer not in modules):
            continue
        last, least, most = run.numbers
        layers = max(map(len, run.curves.values()))
        lines.append(
            f"gradient checkpointing by memory: {last} of {layers} layers in the last batch, {least} to "
            f"{most} so far; at most {run.taken / GIB:.2f} GiB of {run.budget / GIB:.2f} were taken (counted)"
        )
    return lines


def summary() -> str:
    """`report` of all models; says so if nothing was chosen."""
    lines = report()
    if not lines:
        return (
            "gradient checkpointing by memory: it was on in no layer of transformers, or for one batch only"
        )
    return "\n".join(lines)
