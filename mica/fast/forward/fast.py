"""The common case of a linear layer, checked and called in one function of C++.

Active MiCA and LoRA adapters of a linear layer, with autocast or without, with dropout or without; no
patches, modes or tracing; ordinary operands. The base layer is called where its weight cannot be read:
quantised, with hooks, trained. It is recognised in 1 µs, for which `eligibility` takes 13. Anything else
gives None, and then `eligibility` decides, with a reason. Where there is no C++ it decides on every layer: a
training step of SmolLM2 takes 1 to 2 % longer. Calls with little work are then left to PEFT. Nothing is kept
between calls: what could change is read again at each. The C++ is mica/native/check.h.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mica import native
from mica.fast.forward import layer_calls
from mica.fast.forward.eligibility import (
    CALL,
    FORWARDS,
    GLOBAL_HOOKS,
    LINEAR,
    MiCALinearVariant,
    quantised_layers,
)
from mica.fast.settings import settings
from mica.memory import TENSOR_TYPES
from mica.ops import recompute
from mica.paths import choose

_function: Callable[[nn.Module, Tensor], Tensor | None] | None = None  # of the C++, once that is loaded


def call_cpp(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The output of a layer for x (..., in_features), counted by `layer_calls`; None if anything is unusual.

    None, too, until `settle` has loaded the C++.
    """
    return None if _function is None else _function(layer, x)


def settle(x: Tensor) -> bool:
    """Load the C++, before the first layer runs that it may call, and True; False if there is nothing to do.

    This may compile it, which takes 15 s and more, once on a machine: not for layers that PEFT runs.
    """
    if torch.compiler.is_dynamo_compiling() or native.setting() in native.modules:
        return False
    if not (x.is_cpu or x.is_cuda):
        return False
    native.module()
    return True


WHY_SMALL = "a small input, which PEFT's code computes faster than this backend does without C++"
_ANY_PATH = None, "", b"", "auto", b"auto"  # what MICA_BACKEND is where no path is demanded


def why_small(layer: nn.Module, x: Tensor) -> str | None:
    """Why a call for which there is no C++ is left to PEFT; None if it is not.

    With a small x this backend's Python takes longer than it gains: a layer of 64 × 64 took 1.4 to 1.6 times
    as long as with stock PEFT, now 1.02 to 1.05. The answer must not depend on grad mode: a checkpoint's
    second forward must run the same code, or its dropout mask differs. A layer with DoRA is left to PEFT for
    no size: rows of zeros have another answer there.
    """
    if any(type(variant) is DoraLinearVariant for variant in layer.lora_variant.values()):
        return None
    if type(x) not in TENSOR_TYPES or x.numel() >= recompute.MIN_NUMBERS or not x.is_cpu:
        return None
    return WHY_SMALL if is_free() and not native.needs_compiler() and native.module() is None else None


def is_free() -> bool:
    """Whether the user demands neither a path nor a dtype of the products."""
    return settings.compute_dtype is None and choose.setting() in _ANY_PATH


def _configure(module: ModuleType) -> None:
    """Tell the C++ what the classes are, and the functions that they had before anybody replaced them."""
    global _function
    module.tell(
        lora_linear=lora.Linear,
        quantised_layers=quantised_layers,
        variant=MiCALinearVariant,
        linear=nn.Linear,
        identity=nn.Identity,
        dropout=nn.Dropout,
        linear_forward=FORWARDS[nn.Linear],
        conv1d=Conv1D,
        conv1d_forward=FORWARDS[Conv1D],
        identity_forward=FORWARDS[nn.Identity],
        dropout_forward=FORWARDS[nn.Dropout],
        call=CALL,
        functional=vars(functional),
        functional_linear=LINEAR,
        global_hooks=GLOBAL_HOOKS,
        settings=vars(settings),
        noted=layer_calls.noted,
    )
    _function = module.fast


native.when_loaded(_configure)
