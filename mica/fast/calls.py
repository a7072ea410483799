"""How often each layer was called in the last forward of its model, for `mica.fast.explain`.

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
from torch import nn


class _Forward(NamedTuple):
    number: int
    calls: list[ReferenceType[nn.Module]]


class _State(threading.local):
    calls: list[nn.Module] | None = None  # in this thread's current forward


_state = _State()
_forwards: WeakKeyDictionary[nn.Module, _Forward] = WeakKeyDictionary()
_number = 0  # of the latest forward
_outside: dict[int, int] = {}  # id(layer) -> number at its last call outside of any; a reused id hides a 0
is_traced = False


def note(layer: nn.Module) -> None:
    """At the beginning of a layer's forward: 0.2 µs per call."""
    if torch.compiler.is_compiling():
        _note_trace()
        return
    calls = _state.calls
    if calls is None:
        _outside[id(layer)] = _number
    else:
        calls.append(layer)


@torch.compiler.assume_constant_result
def _note_trace() -> None:
    """Runs while a graph is traced and leaves nothing in it: compiled calls are not counted."""
    global is_traced
    is_traced = True


@contextmanager
def counting(model: nn.Module) -> Iterator[None]:
    """Around a forward of PEFT's model or its tuner."""
    global _number
    if torch._C._current_graph_task_id() != -1:
        yield
        return
    _number = number = _number + 1
    outer = _state.calls
    calls = _state.calls = [] if outer is None else outer
    start = len(calls)
    try:
        yield
    finally:
        _state.calls = outer
    _forwards[model] = _Forward(number, [ref(layer) for layer in calls[start:]])


def forget() -> None:
    """Until the next forward nothing is known."""
    _forwards.clear()
    _outside.clear()


def counts() -> dict[nn.Module, int]:
    """Each module of each model that has run a forward -> its calls in the last one, where they are known.

    Empty once a MiCA layer has been traced by torch.compile.
    """
    counts_of: dict[nn.Module, int] = {}
    if is_traced:
        return counts_of
    for model, forward in sorted(_forwards.items(), key=lambda item: item[1].number):
        called = Counter(reference() for reference in forward.calls)
        for module in model.modules():
            counts_of[module] = called[module]
            if not counts_of[module] and _outside.get(id(module), -1) >= forward.number:
                del counts_of[module]
    return counts_of
