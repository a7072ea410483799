"""How often each layer was called in the last forward of its model, and where PEFT ran: for `explain`.

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

from mica.fast.settings import settings


class _Forward(NamedTuple):
    number: int
    calls: list[ReferenceType[nn.Module]]
    peft: list[tuple[ReferenceType[nn.Module], str]]  # of the last forward with the backend on


class _State(threading.local):
    # in this thread's current forward: the layer, and why PEFT's code ran its adapter
    calls: list[tuple[nn.Module, str | None]] | None = None


_state = _State()
_forwards: WeakKeyDictionary[nn.Module, _Forward] = WeakKeyDictionary()
_number = 0  # of the latest forward
_outside: dict[int, int] = {}  # id(layer) -> number at its last call outside of any; a reused id hides a 0
is_traced = False


def note(layer: nn.Module, reason: str | None = None) -> None:
    """At the beginning of a layer's forward, with the reason where PEFT's code runs an adapter although the
    backend is on: 0.2 µs per call.
    """
    if torch.compiler.is_compiling():
        _note_trace()
        return
    calls = _state.calls
    if calls is None:
        _outside[id(layer)] = _number
    else:
        calls.append((layer, reason))


@torch.compiler.assume_constant_result
def _note_trace() -> None:
    """Runs while a graph is traced and leaves nothing in it: compiled calls are not counted."""
    global is_traced
    is_traced = True


@contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    global _number
    if torch._C._current_graph_task_id() != -1:
        yield
        return
    _number = number = _number + 1
    outer = _state.calls
    calls = _state.calls = [] if outer is None else outer
    first = len(calls)
    try:
        yield
    finally:
        _state.calls = outer
    by_peft = [(ref(layer), reason) for layer, reason in calls[first:] if reason is not None]
    if not settings.enabled and model in _forwards:  # it shows nothing about calls with the backend on
        by_peft = _forwards[model].peft
    _forwards[model] = _Forward(number, [ref(layer) for layer, _ in calls[first:]], by_peft)


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
    _outside.clear()


def counts() -> dict[nn.Module, int]:
    """Each module of each model that has run a forward -> its calls in the last one, where they are known.

    Empty once a MiCA layer has been traced by torch.compile.
    """
    counts_of: dict[nn.Module, int] = {}
    for model, forward in _in_order():
        called = Counter(reference() for reference in forward.calls)
        for module in model.modules():
            counts_of[module] = called[module]
            if not counts_of[module] and _outside.get(id(module), -1) >= forward.number:
                del counts_of[module]
    return counts_of


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


def _in_order() -> list[tuple[nn.Module, _Forward]]:
    return [] if is_traced else sorted(_forwards.items(), key=lambda item: item[1].number)
