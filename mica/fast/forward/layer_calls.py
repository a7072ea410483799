"""For `explain`: how often each layer was called since an adapter was last added, and how it ran last.

Calls with the backend off do not count, nor do those that a backward makes again (checkpointing), nor those
of compiled code, which cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from mica.fast import checkpointing
from mica.fast.settings import settings, while_enabled
from mica.ops import norms
from mica.ops.operator import as_matrix, is_autocast


class Input(NamedTuple):
    """What is known about the x of a call.

    Attributes:
        dtype, shape, strides: Those of x.
        autocast_dtype: The dtype of autocast, where that was on; else None.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    autocast_dtype: torch.dtype | None

    def as_matrix(self) -> Tensor:
        """(tokens, in_features) without memory, with the strides and the dtype in which it is multiplied."""
        x = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
        return as_matrix(x if self.autocast_dtype is None else x.to(self.autocast_dtype))


class Calls(NamedTuple):
    """The calls of a layer, or of a whole model.

    Attributes:
        count: How often it was called.
        why_peft: Why PEFT's code ran the layer's adapter in the last call; None if it did not.
        x: The x of the last call in which operators ran; None if that is not known.
    """

    count: int = 0
    why_peft: str | None = None
    x: Input | None = None


# A layer -> the fields of its Calls, with those of the Input. C++ writes here, too: `note` in
# mica/native/mica_native.cpp. No WeakKeyDictionary, in which that takes three times as long.
noted: dict[ReferenceType[nn.Module], tuple[int, str | None, tuple | None]] = {}
_is_traced = False


def note(layer: nn.Module, reason: str | None = None, x: Tensor | None = None) -> None:
    """Note a call, at the beginning of a layer's forward.

    Args:
        layer: The layer that is about to run.
        reason: Why PEFT's code runs its adapter although the backend is on; None if it does not.
        x: The layer's input where operators run; else None.
    """
    if torch.compiler.is_compiling():
        _note_trace()
        return
    if torch._C._current_graph_task_id() != -1:  # a backward computes the layer again
        return
    known_input = None
    if x is not None:
        autocast_dtype = None
        if torch._C._is_any_autocast_enabled() and is_autocast(x.device.type):
            autocast_dtype = torch.get_autocast_dtype(x.device.type)
        known_input = x.dtype, tuple(x.shape), x.stride(), autocast_dtype
    key = ref(layer)
    count, *_ = noted.get(key, (0,))
    noted[key] = count + 1, reason, known_input


@torch.compiler.assume_constant_result
def _note_trace() -> None:
    """Runs while a graph is traced and leaves nothing in it: compiled calls are not counted."""
    global _is_traced
    _is_traced = True


def clear() -> None:
    """Until the next call nothing is known."""
    global _is_traced
    _is_traced = False
    noted.clear()


@while_enabled
def whole_forward(stock, self, *args, **kwargs):
    """For PEFT's model and its tuner: it shows that a model was called all of whose layers are bypassed.

    The norms of a model that was copied, or adapted before this import, are known from here on.
    """
    note(self)
    if not torch.compiler.is_compiling():
        norms.note(self)
    output = stock(self, *args, **kwargs)
    if settings.memory is not None and not torch.compiler.is_compiling():
        checkpointing.note_output(output)
    return output


def calls_of(modules: Iterable[nn.Module]) -> dict[nn.Module, Calls]:
    """Each of a model's modules -> its calls; those that are neither a layer nor PEFT's have none.

    Empty where nothing is known: before the first call, and once torch.compile has traced a layer.
    """
    found = {}
    for module in modules:
        count, why_peft, x = noted.get(ref(module), (0, None, None))
        found[module] = Calls(count, why_peft, Input(*x) if x else None)
    if _is_traced or not any(calls.count for calls in found.values()):
        return {}
    return found
