"""The common case of a linear layer, recognised in 5 µs: `eligibility` takes 13 for the same answer.

One active MiCA adapter on an nn.Linear, with autocast or without, no dropout, hooks, patches, modes, tracing,
and ordinary operands. Anything else gives None, and then `eligibility` decides, with a reason. Nothing is
cached between calls: what could change is read again at each, but several things by one call into C. After a
backward, whose code has filled the processor's caches, this costs a layer four times its own 5 µs.
"""

from __future__ import annotations

from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as nn_module

from mica.dtypes import FLOATING, SIXTEEN_BIT
from mica.fast.forward.eligibility import CALL, FORWARDS, LINEAR, MiCALinearVariant
from mica.fast.settings import compute_dtype
from mica.ops.linear import linear_eager
from mica.ops.operator import TENSOR_TYPES, is_eager

_LINEAR, _IDENTITY = nn.Linear, nn.Identity
_parts = itemgetter("base_layer", "lora_A", "lora_B", "lora_dropout")
_hooks = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_facts = attrgetter("layout", "is_meta", "requires_grad")
_FROZEN = torch.strided, False, False
_PLAIN = torch.strided, False, False, torch.strided, False
_CAST = (torch.float32, *SIXTEEN_BIT)  # what autocast casts
_CODE = FORWARDS[_LINEAR], FORWARDS[_IDENTITY], CALL, CALL, LINEAR
_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


class FusedEager(NamedTuple):
    """Base product and adapter in one operator, whose own checks have been made here."""

    weight: Tensor  # (out_features, in_features)
    lora_A: Tensor  # (rank, in_features)
    lora_B: Tensor  # (out_features, rank)
    scaling: float
    bias: Tensor | None
    dtype: torch.dtype | None  # of the low-rank products; None: that of x
    autocast_dtype: torch.dtype | None  # where autocast is on

    def __call__(self, x: Tensor) -> Tensor:
        return linear_eager(x, *self)


def fused_eager(layer, x: Tensor) -> FusedEager | None:
    """How this layer runs on x (..., in_features); None if anything is unusual."""
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

    if torch.is_autocast_enabled(device_type):
        if not _are_cast(x, weight, bias, A, B):
            return None
        return FusedEager(weight, A, B, scaling, bias, None, torch.get_autocast_dtype(device_type))
    if not _are_multiplied(x, weight, A, B, layer.cast_input_dtype_enabled):
        return None
    return FusedEager(weight, A, B, scaling, bias, compute_dtype(x.dtype), None)


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
    """Whether calls do no more than their classes' formulas, without dropout and without a factor's bias."""
    if not (type(base) is type(lora_A) is type(lora_B) is _LINEAR and type(dropout) is _IDENTITY):
        return False
    if any(_GLOBAL_HOOKS):
        return False
    code = _LINEAR.forward, _IDENTITY.forward, _LINEAR.__call__, _IDENTITY.__call__, functional.linear
    if code != _CODE:
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
