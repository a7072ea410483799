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

import gc
import threading
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from mica.fast.costs import GIVEN, Curve, count, peak, shapes_of
from mica.fast.settings import AUTO, settings
from mica.memory import has_no_values

GIB = 2**30
MARGIN = 0.05  # of a device that "auto" leaves free: its allocator rounds, and workspaces are not counted
_STATES = 2  # numbers that Adam keeps of each that is trained
_CAREFUL = 1.1  # what is counted becomes so many times as much when memory runs out nevertheless
# Bytes for a number that the model returns: its loss keeps a copy and log-probabilities in 32 bits, and its
# backward two gradients
_LOSS = 16


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
runs: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
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
            stock = vars(layer)[GIVEN]
        except KeyError:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {GIVEN!r}") from None
        if settings.memory is None or not settings.enabled or torch.compiler.is_compiling():
            return stock
        return partial(_run, layer, stock)

    def __set__(self, layer: nn.Module, function: Callable) -> None:
        vars(layer)[GIVEN] = function

    def __delete__(self, layer: nn.Module) -> None:
        del vars(layer)[GIVEN]


def install() -> None:
    """Have transformers' layers ask here, if `settings.memory` is set; nothing is known of any model."""
    global _step_hook
    if settings.memory is not None and _step_hook is None:
        setattr(GradientCheckpointingLayer, GIVEN, GivenFunction())
        _step_hook = register_optimizer_step_post_hook(_note_step)
    forget()


def uninstall() -> None:
    """Give transformers' class back as it was."""
    global _step_hook
    if _step_hook is not None:
        delattr(GradientCheckpointingLayer, GIVEN)
        _step_hook.remove()
        _step_hook = None
    forget()


def forget() -> None:
    """Layers have changed: count them anew."""
    global _care, _is_uncounted
    _thread.forward = None
    runs.clear()
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
    shapes = shapes_of(args, kwargs, length)
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
    return _Forward(runs.setdefault(layer, Run()), shapes, x)


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


# ---------------------------------------------------------------------------------------------------
# what there is
# ---------------------------------------------------------------------------------------------------


def _budget(device: torch.device) -> tuple[float, float]:
    """Bytes that a step may take of the device, and those that are taken before its layers run.

    The latter with gradients and an optimizer's states that are still to come.
    """
    taken, trained = taken_of(device)
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


def taken_of(device: torch.device) -> tuple[float, list[Tensor]]:
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
    for layer, run in runs.items():
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
