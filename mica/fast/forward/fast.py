"""The common case of a linear layer, checked and called in one function of C++.

One active MiCA adapter on an nn.Linear, with autocast or without, with dropout or without; no hooks, patches,
modes or tracing; ordinary operands. It is recognised in 1 µs, for which `eligibility` takes 13. Anything else
gives None, and then `eligibility` decides, with a reason. Where there is no C++ it decides on every layer: a
training step of SmolLM2 takes 1 to 2 % longer. Calls with little work are then left to PEFT. Nothing is kept
between calls: what could change is read again at each. The C++ is mica/native/check.h.
"""

from __future__ import annotations

from types import ModuleType

from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

from mica import native
from mica.fast.forward import call_counts
from mica.fast.forward.eligibility import CALL, FORWARDS, GLOBAL_HOOKS, LINEAR, MiCALinearVariant
from mica.fast.settings import settings
from mica.memory import TENSOR_TYPES
from mica.ops import kept
from mica.paths import choose


def _look_for_cpp(layer, x: Tensor) -> Tensor | None:
    """The first call in a process may compile the C++, once on a machine."""
    global call
    module = native.module()
    if module is None:
        return None
    configure(module)
    call = module.fast
    return call(layer, x)


# The output of a layer for x (..., in_features), counted by `call_counts`; None if anything is unusual.
call = _look_for_cpp


SMALL = "a small input, which PEFT's code computes faster than this backend does without C++"
_ANY_PATH = None, "", b"", "auto", b"auto"  # what MICA_BACKEND is where no path is demanded


def why_small(x: Tensor) -> str | None:
    """Why a call for which there is no C++ is left to PEFT; None if it is not.

    With a small x this backend's Python takes longer than it gains: a layer of 64 × 64 took 1.4 to 1.6 times
    as long as with stock PEFT, now 1.02 to 1.05. Nothing counts that may differ when a checkpoint computes
    the call again, such as gradients: the same code has to draw the same dropout mask.
    """
    if type(x) not in TENSOR_TYPES or x.numel() >= kept.SMALL or not x.is_cpu:
        return None
    is_free = settings.compute_dtype is None and choose.setting() in _ANY_PATH
    return SMALL if is_free and native.module() is None else None


def configure(module: ModuleType) -> None:
    """Tell the C++ what the classes are, and the functions that they had before anybody replaced them."""
    classes = lora.Linear, MiCALinearVariant, nn.Linear, nn.Identity, nn.Dropout
    forwards = FORWARDS[nn.Linear], FORWARDS[nn.Identity], FORWARDS[nn.Dropout]
    functions = *forwards, CALL, vars(functional), LINEAR
    counted = call_counts.current, call_counts.outside, call_counts.latest
    module.configure_check((*classes, *functions, GLOBAL_HOOKS, vars(settings), *counted))
