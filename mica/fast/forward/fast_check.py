"""The common case of a linear layer, recognised in 3 µs: `eligibility` takes 8 for the same answer.

One active MiCA adapter on an nn.Linear, without dropout, hooks, patches, autocast, modes or tracing, and
ordinary operands. Anything else gives None, and then `eligibility` decides, with a reason. Nothing is cached
between calls: what could change is read again at each.
"""

from __future__ import annotations

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


class Direct(NamedTuple):
    """Base product and adapter in one operator, whose own checks have been made here."""

    weight: Tensor  # (out_features, in_features)
    lora_A: Tensor  # (rank, in_features)
    lora_B: Tensor  # (out_features, rank)
    scaling: float
    bias: Tensor | None
    dtype: torch.dtype | None  # of the low-rank products; None: that of x

    def __call__(self, x: Tensor) -> Tensor:
        return linear_eager(x, *self)


def direct(layer, x: Tensor) -> Direct | None:
    """How this layer runs on x (..., in_features); None if anything is unusual."""
    kind = "cpu" if x.is_cpu else "cuda"
    if (
        type(layer) is not lora.Linear
        or not (x.is_cpu or x.is_cuda)
        or type(x) not in TENSOR_TYPES
        or not is_eager()
        or torch.is_autocast_enabled(kind)
    ):
        return None
    state, modules = layer.__dict__, layer._modules
    name = layer.active_adapter
    if type(name) is not str:
        if len(name) != 1:
            return None
        (name,) = name
    base, lora_A = modules["base_layer"], modules["lora_A"]._modules.get(name)
    if lora_A is None:
        return None
    lora_B, dropout = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
    scaling = layer.scaling[name]
    if (
        layer.disable_adapters
        or layer.merged
        or "_tp_info" in state
        or "_hf_tp_plan" in base.__dict__
        or type(layer.lora_variant.get(name)) is not MiCALinearVariant
        or type(scaling) is not float
        or not (type(base) is type(lora_A) is type(lora_B) is _LINEAR and type(dropout) is _IDENTITY)
        or _LINEAR.forward is not FORWARDS[_LINEAR]
        or _IDENTITY.forward is not FORWARDS[_IDENTITY]
        or _LINEAR.__call__ is not CALL
        or _IDENTITY.__call__ is not CALL
        or functional.linear is not LINEAR
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return None
    for module in (base, lora_A, lora_B, dropout):  # would calling it do more than its class's forward?
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return None
    parameters, of_A, of_B = base._parameters, lora_A._parameters, lora_B._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    A, B = of_A.get("weight"), of_B.get("weight")
    if of_A["bias"] is not None or of_B["bias"] is not None:
        return None
    for tensor in (weight, A, B) if bias is None else (weight, A, B, bias):
        if (
            type(tensor) not in TENSOR_TYPES
            or tensor.layout is not torch.strided
            or tensor.is_meta
            or hasattr(tensor, "ds_id")
        ):
            return None
    if (
        weight.requires_grad
        or B.requires_grad
        or (bias is not None and bias.requires_grad)
        or A.is_inference()
        or x.layout is not torch.strided
        or x.is_nested
    ):
        return None
    dtype, adapter_dtype = x.dtype, A.dtype
    if weight.dtype is not dtype or B.dtype is not adapter_dtype or dtype not in FLOATING:
        return None
    if adapter_dtype is not dtype and not (
        adapter_dtype is torch.float32 and dtype in SIXTEEN_BIT and layer.cast_input_dtype_enabled
    ):
        return None
    return Direct(weight, A, B, scaling, bias, compute_dtype(dtype))
