"""For `explain`: how often each layer was called in the last forward, with what x, and where PEFT ran.

A forward is one of PEFT's model or tuner that ended without an exception, with the backend on. One within a
backward is a recomputation and does not count. Calls outside of any forward (`generate`, a part of the model
alone, recomputations) do not count either, but a layer that has had one since is not reported as uncalled.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from mica.fast.settings import settings
from mica.ops.operator import as_matrix, is_autocast


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


class Calls(NamedTuple):
    """Those of a module in the last forward."""

    count: int | None = None  # None: unknown
    why_peft: Sequence[str] = ()  # why PEFT's code ran the layer's adapter, for each call in which it did
    x: Input | None = None  # that of the last call in which operators ran


class _Forward(NamedTuple):
    number: int
    calls: list[tuple[ReferenceType[nn.Module], str | None, tuple | None]]


class _Current(threading.local):
    # in this thread's current forward: the layer, why PEFT's code ran its adapter, and the fields of an Input
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
    if torch._C._is_any_autocast_enabled() and is_autocast(x.device.type):
        autocast_dtype = torch.get_autocast_dtype(x.device.type)
    note(layer, None, (x.dtype, tuple(x.shape), x.stride(), autocast_dtype))


@torch.compiler.assume_constant_result
def _note_trace() -> None:
    """Runs while a graph is traced and leaves nothing in it: compiled calls are not counted."""
    global is_traced
    is_traced = True


@contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    if not settings.enabled or torch._C._current_graph_task_id() != -1:
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
    _forwards[model] = _Forward(number, [(ref(layer), why_peft, x) for layer, why_peft, x in calls[first:]])


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


def last_calls() -> dict[nn.Module, Calls]:
    """Each module of each model that has run a forward -> its calls in the last one.

    Empty once a MiCA layer has been traced by torch.compile.
    """
    found: dict[nn.Module, Calls] = {}
    if is_traced:
        return found
    for model, forward in sorted(_forwards.items(), key=lambda item: item[1].number):
        calls_of = defaultdict(list)
        for reference, *call in forward.calls:
            calls_of[reference()].append(call)
        for module in model.modules():
            calls = calls_of[module]
            was_called_since = outside.get(ref(module), -1) >= forward.number
            count = None if was_called_since and not calls else len(calls)
            reasons = [why_peft for why_peft, _ in calls if why_peft is not None]
            inputs = [x for _, x in calls if x is not None]
            found[module] = Calls(count, reasons, Input(*inputs[-1]) if inputs else None)
    return found


def called_outside() -> set[nn.Module]:
    """The layers that have been called outside of any forward since adapters were added."""
    found = {reference() for reference in outside}
    return set() if is_traced else found - {None}
