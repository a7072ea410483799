"""The common case of a linear layer, recognised in 1 µs by C++, in 5 by Python; `eligibility` takes 13.

One active MiCA adapter on an nn.Linear, with autocast or without, with dropout or without; no hooks, patches,
modes or tracing; ordinary operands. Anything else gives None, and then `eligibility` decides, with a reason.
Nothing is kept between calls: what could change is read again at each, in Python several things by one call
into C. The C++ is mica/native/check.h. Python's turn comes where that is not built, and both give the same.
"""

from __future__ import annotations

from operator import attrgetter, itemgetter
from types import ModuleType
from typing import NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as nn_module

from mica import native
from mica.dtypes import FLOATING, SIXTEEN_BIT
from mica.fast.forward import call_counts
from mica.fast.forward.eligibility import CALL, FORWARDS, LINEAR, MiCALinearVariant
from mica.fast.settings import compute_dtype
from mica.memory import TENSOR_TYPES
from mica.ops.linear import linear_eager
from mica.ops.operator import is_eager

_LINEAR, _IDENTITY, _DROPOUT = nn.Linear, nn.Identity, nn.Dropout
_parts = itemgetter("base_layer", "lora_A", "lora_B", "lora_dropout")
_hooks = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_facts = attrgetter("layout", "is_meta", "requires_grad")
_FROZEN = torch.strided, False, False
_PLAIN = torch.strided, False, False, torch.strided, False
_CAST = (torch.float32, *SIXTEEN_BIT)  # what autocast casts
_CODE = {kind: (FORWARDS[_LINEAR], FORWARDS[kind], CALL, CALL, LINEAR) for kind in (_IDENTITY, _DROPOUT)}
_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


class Operands(NamedTuple):
    """Those of base product and adapter in one operator, whose own checks have been made here."""

    weight: Tensor  # (out_features, in_features)
    lora_A: Tensor  # (rank, in_features)
    lora_B: Tensor  # (out_features, rank)
    scaling: float
    bias: Tensor | None
    dropout_p: float  # 0 in eval mode
    autocast_dtype: torch.dtype | None  # where autocast is on


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
    """The fields of `Operands`; None if anything is unusual."""
    module = native.module()
    if module is None:
        return operands_by_python(layer, x)
    if module is not _configured:
        _configure(module)
    return module.operands(layer, x)


_configured: ModuleType | None = None


def _configure(module: ModuleType) -> None:
    """Tell the C++ what the classes are, and the functions that they had before anybody replaced them."""
    global _configured
    classes = lora.Linear, MiCALinearVariant, _LINEAR, _IDENTITY, _DROPOUT
    forwards = FORWARDS[_LINEAR], FORWARDS[_IDENTITY], FORWARDS[_DROPOUT]
    module.configure_check(*classes, *forwards, CALL, vars(functional), LINEAR, _GLOBAL_HOOKS)
    _configured = module


def operands_by_python(layer, x: Tensor) -> Operands | None:
    """What the C++ finds."""
    if type(layer) is not lora.Linear or type(x) not in TENSOR_TYPES or not is_eager():
        return None
    if x.is_cpu:
        device_type = "cpu"
    elif x.is_cuda:
        device_type = "cuda"
    else:
        return None

    name = layer.active_adapter
    if type(name) is not str:
        if len(name) != 1:
            return None
        (name,) = name
    base, lora_As, lora_Bs, dropouts = _parts(layer._modules)
    lora_A = lora_As._modules.get(name)
    if lora_A is None:  # the active adapter is not on this layer
        return None
    lora_B = lora_Bs._modules[name]
    dropout = dropouts._modules[name]
    scaling = layer.scaling[name]

    if _is_special(layer, base, name) or type(scaling) is not float:
        return None
    if not _are_plain_modules(base, lora_A, lora_B, dropout):
        return None
    weight = base._parameters.get("weight")
    bias = base._parameters.get("bias")
    A = lora_A._parameters.get("weight")
    B = lora_B._parameters.get("weight")
    if not _are_plain_tensors(x, weight, bias, A, B):
        return None

    dropout_p = 0.0
    if type(dropout) is _DROPOUT:
        if type(dropout.p) is not float or not 0.0 <= dropout.p < 1.0:
            return None
        dropout_p = dropout.p if dropout.training else 0.0
    if torch.is_autocast_enabled(device_type):
        if not _are_cast(x, weight, bias, A, B):
            return None
        return Operands(weight, A, B, scaling, bias, dropout_p, torch.get_autocast_dtype(device_type))
    if not _are_multiplied(x, weight, A, B, layer.cast_input_dtype_enabled):
        return None
    return Operands(weight, A, B, scaling, bias, dropout_p, None)


def _is_special(layer, base: nn.Module, name: str) -> bool:
    """Whether the layer is in a state in which something else than its one MiCA adapter counts."""
    return (
        layer.disable_adapters
        or bool(layer.merged)
        or "_tp_info" in layer.__dict__
        or "_hf_tp_plan" in base.__dict__
        or type(layer.lora_variant.get(name)) is not MiCALinearVariant
    )


def _are_plain_modules(base: nn.Module, lora_A: nn.Module, lora_B: nn.Module, dropout: nn.Module) -> bool:
    """Whether calls do no more than their classes' formulas, without a factor's bias."""
    kind = type(dropout)
    if not (type(base) is type(lora_A) is type(lora_B) is _LINEAR and kind in _CODE):
        return False
    if any(_GLOBAL_HOOKS):
        return False
    code = _LINEAR.forward, kind.forward, _LINEAR.__call__, kind.__call__, functional.linear
    if code != _CODE[kind]:
        return False
    for module in (base, lora_A, lora_B, dropout):
        if any(_hooks(module)) or "forward" in module.__dict__:
            return False
    return lora_A._parameters["bias"] is None and lora_B._parameters["bias"] is None


def _are_plain_tensors(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None
) -> bool:
    """Whether all are dense and in memory, and all but x and lora_A are frozen; None, of a weight, is not."""
    for tensor in (weight, lora_A, lora_B):
        if type(tensor) not in TENSOR_TYPES or hasattr(tensor, "ds_id"):
            return False
    has_bias = bias is not None
    if has_bias and (type(bias) not in TENSOR_TYPES or hasattr(bias, "ds_id") or _facts(bias) != _FROZEN):
        return False
    if _facts(weight) != _FROZEN or _facts(lora_B) != _FROZEN:
        return False
    return (lora_A.layout, lora_A.is_meta, lora_A.is_inference(), x.layout, x.is_nested) == _PLAIN


def _are_cast(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether autocast gives all of them one dtype."""
    if bias is not None and bias.dtype not in _CAST:
        return False
    return x.dtype in _CAST and weight.dtype in _CAST and lora_A.dtype in _CAST and lora_B.dtype in _CAST


def _are_multiplied(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, casts_input: bool) -> bool:
    """Whether a layer without autocast takes these dtypes: one for all, or fp32 masters over 16 bits."""
    dtype = x.dtype
    if weight.dtype is not dtype or lora_B.dtype is not lora_A.dtype or dtype not in FLOATING:
        return False
    if lora_A.dtype is dtype:
        return True
    is_master = lora_A.dtype is torch.float32 and dtype in SIXTEEN_BIT
    return is_master and casts_input
