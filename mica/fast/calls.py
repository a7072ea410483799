"""How often each layer was called in the last forward of its model, for `mica.fast.explain`.

A forward is one of PEFT's model or tuner that came to its end. One in a backward is a recomputation and does
not count. Calls outside of any (`generate`, a part of the model alone, recomputations) do not count, but a
layer that had one since is not said to be uncalled.
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
    calls: list[nn.Module] | None = None  # of the forward that this thread is in


_state = _State()
_forwards: WeakKeyDictionary[nn.Module, _Forward] = WeakKeyDictionary()
_number = 0  # of the forward that began last
_outside: dict[int, int] = {}  # id(layer) -> the number at its last call outside of any; a reused id silences
is_traced = False


def note(layer: nn.Module) -> None:
    """The layer's forward begins: 0.2 µs, once a call."""
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
    """Runs while a graph is traced, and leaves nothing in it: calls of compiled code are not seen."""
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
    """Nothing is known before the next forward."""
    _forwards.clear()
    _outside.clear()


def counts() -> dict[nn.Module, int]:
    """Every module of every model that had a forward -> its calls in the last one, as far as they are known.

    Empty once a MiCA layer has been traced by torch.compile.
    """
    found: dict[nn.Module, int] = {}
    if is_traced:
        return found
    for model, forward in sorted(_forwards.items(), key=lambda item: item[1].number):
        called = Counter(reference() for reference in forward.calls)
        for module in model.modules():
            found[module] = called[module]
            if not found[module] and _outside.get(id(module), -1) >= forward.number:
                del found[module]
    return found
