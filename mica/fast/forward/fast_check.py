"""The common case of a linear layer, recognised in 1 µs by C++; `eligibility` takes 13.

One active MiCA adapter on an nn.Linear, with autocast or without, with dropout or without; no hooks, patches,
modes or tracing; ordinary operands. Anything else gives None, and then `eligibility` decides, with a reason.
Where there is no C++ it decides on every layer: a training step of SmolLM2 takes 1 to 2 % longer. Nothing is
kept between calls: what could change is read again at each. The C++ is mica/native/check.h.
"""

from __future__ import annotations

from types import ModuleType

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as nn_module

from mica import native
from mica.fast.forward import call_counts
from mica.fast.forward.eligibility import CALL, FORWARDS, LINEAR, MiCALinearVariant
from mica.fast.settings import compute_dtype
from mica.ops.linear import linear_eager

_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def run(layer, x: Tensor) -> Tensor | None:
    """The output of this layer for x (..., in_features); None if anything is unusual.

    The first call in a process may compile the C++, once on a machine.
    """
    if torch.compiler.is_compiling():
        return None
    operands = operands_of(layer, x)
    if operands is None:
        return None
    call_counts.note_operators(layer, x)
    weight, lora_A, lora_B, scaling, bias, dropout_p, autocast_dtype = operands
    dtype = None if autocast_dtype is not None else compute_dtype(x.dtype)
    dropout = seeded(dropout_p, x.device)
    return linear_eager(x, weight, lora_A, lora_B, scaling, bias, dtype, *dropout, autocast_dtype)


def seeded(p: float, device: torch.device) -> tuple[float, Tensor | None]:
    """Probability and a seed from torch's generator: checkpointing restores that, and so the mask."""
    return p, None if p == 0.0 else torch.randint(0, 2**63 - 1, (1,), device=device)


def operands_of(layer, x: Tensor) -> tuple | None:
    """weight, lora_A, lora_B, scaling, bias, dropout_p and autocast_dtype; None if anything is unusual.

    The operator's own checks have been made. The bias and autocast_dtype may be None; in eval mode dropout_p
    is 0.
    """
    module = native.module()
    if module is None:
        return None
    if module is not _configured:
        _configure(module)
    return module.operands(layer, x)


_configured: ModuleType | None = None


def _configure(module: ModuleType) -> None:
    """Tell the C++ what the classes are, and the functions that they had before anybody replaced them."""
    global _configured
    classes = lora.Linear, MiCALinearVariant, nn.Linear, nn.Identity, nn.Dropout
    forwards = FORWARDS[nn.Linear], FORWARDS[nn.Identity], FORWARDS[nn.Dropout]
    module.configure_check(*classes, *forwards, CALL, vars(functional), LINEAR, _GLOBAL_HOOKS)
    _configured = module
