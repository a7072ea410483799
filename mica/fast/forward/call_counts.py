"""For `explain`: how often each layer was called in the last forward, with what x, and where PEFT ran.

A forward is one of PEFT's model or tuner that ended without an exception. One within a backward is a
recomputation and does not count. Calls outside of any forward (`generate`, a part of the model alone,
recomputations) do not count either, but a layer that has had one since is not reported as uncalled.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from mica.fast.settings import settings
from mica.ops.operator import as_matrix


class Input(NamedTuple):
    """What is known about the x of a call."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    autocast_dtype: torch.dtype | None  # where autocast was on

    def as_matrix(self) -> Tensor:
        """(tokens, in_features) without memory, with the strides and the dtype in which it is multiplied."""
        x = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
        return as_matrix(x if self.autocast_dtype is None else x.to(self.autocast_dtype))


class _Forward(NamedTuple):
    number: int
    calls: list[ReferenceType[nn.Module]]
    # of the last forward with the backend on
    peft: list[tuple[ReferenceType[nn.Module], str]]
    inputs: list[tuple[ReferenceType[nn.Module], Input]]


class _Current(threading.local):
    # in this thread's current forward: the layer, why PEFT's code ran its adapter, and what x was
    calls: list[tuple[nn.Module, str | None, tuple | None]] | None = None


# C++ adds to these three, too: `note` in mica/native/module.cpp.
current = _Current()
latest = [0]  # the number of the latest forward
# A layer -> number at its last call outside of any: noted in 53 ns, in a WeakKeyDictionary in 184.
outside: dict[ReferenceType[nn.Module], int] = {}

_forwards: WeakKeyDictionary[nn.Module, _Forward] = WeakKeyDictionary()
is_traced = False


def note(layer: nn.Module, reason: str | None = None, x: tuple | None = None) -> None:
    """At the beginning of a layer's forward: takes 0.2 µs.

    reason: where PEFT's code runs an adapter although the backend is on. x: the fields of an
    `Input`, where operators run.
    """
    if torch.compiler.is_compiling():
        _note_trace()
        return
    calls = current.calls
    if calls is None:
        outside[ref(layer)] = latest[0]
    else:
        calls.append((layer, reason, x))


def note_operators(layer: nn.Module, x: Tensor) -> None:
    """`note` of a layer that runs on operators, with what `explain` needs to know of x: takes 0.6 µs more."""
    if torch.compiler.is_compiling() or current.calls is None:  # nobody asks
        note(layer)
        return
    autocast_dtype = None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        autocast_dtype = torch.get_autocast_dtype(x.device.type)
    note(layer, None, (x.dtype, tuple(x.shape), x.stride(), autocast_dtype))


@torch.compiler.assume_constant_result
def _note_trace() -> None:
    """Runs while a graph is traced and leaves nothing in it: compiled calls are not counted."""
    global is_traced
    is_traced = True


@contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    if torch._C._current_graph_task_id() != -1:
        yield
        return
    latest[0] += 1
    number = latest[0]
    outer = current.calls
    calls = current.calls = [] if outer is None else outer
    first = len(calls)
    try:
        yield
    finally:
        current.calls = outer
    own = calls[first:]
    called = [ref(layer) for layer, *_ in own]
    if not settings.enabled and model in _forwards:  # it shows nothing about calls with the backend on
        _forwards[model] = _forwards[model]._replace(number=number, calls=called)
        return
    by_peft = [(ref(layer), why_peft) for layer, why_peft, _ in own if why_peft is not None]
    last_inputs = {layer: x for layer, _, x in own if x is not None}
    inputs = [(ref(layer), Input(*x)) for layer, x in last_inputs.items()]
    _forwards[model] = _Forward(number, called, by_peft, inputs)


def whole_forward(stock):
    """For PEFT's model and its tuner: one of them is around every forward of the whole model."""

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return stock(self, *args, **kwargs)
        with _counting(self):
            return stock(self, *args, **kwargs)

    return forward


def clear() -> None:
    """Until the next forward nothing is known."""
    _forwards.clear()
    outside.clear()


def counts() -> dict[nn.Module, int]:
    """Each module of each model that has run a forward -> its calls in the last one, where they are known.

    Empty once a MiCA layer has been traced by torch.compile.
    """
    counts_of: dict[nn.Module, int] = {}
    for model, forward in _in_order():
        called = Counter(reference() for reference in forward.calls)
        for module in model.modules():
            counts_of[module] = called[module]
            if not counts_of[module] and outside.get(ref(module), -1) >= forward.number:
                del counts_of[module]
    return counts_of


def called_outside() -> set[nn.Module]:
    """The layers that have been called outside of any forward since adapters were added."""
    found = {reference() for reference in outside}
    return set() if is_traced else found - {None}


def peft_reasons() -> dict[nn.Module, list[str]]:
    """Each module whose adapter PEFT's code ran in the last forward with the backend on -> why, by call."""
    reasons: dict[nn.Module, list[str]] = {}
    for model, forward in _in_order():
        for module in model.modules():
            reasons.pop(module, None)
        for reference, reason in forward.peft:
            if (layer := reference()) is not None:
                reasons.setdefault(layer, []).append(reason)
    return reasons


def inputs() -> dict[nn.Module, Input]:
    """Each layer that ran on operators in the last forward with the backend on -> the x of its last call."""
    inputs_of: dict[nn.Module, Input] = {}
    for _, forward in _in_order():
        for reference, x in forward.inputs:
            if (layer := reference()) is not None:
                inputs_of[layer] = x
    return inputs_of


def _in_order() -> list[tuple[nn.Module, _Forward]]:
    return [] if is_traced else sorted(_forwards.items(), key=lambda item: item[1].number)
