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


class Direct(NamedTuple):
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


def direct(layer, x: Tensor) -> Direct | None:
    """How this layer runs on x (..., in_features); None if anything is unusual."""
    if type(layer) is not lora.Linear or not is_eager() or type(x) not in TENSOR_TYPES:
        return None
    if x.is_cpu:
        kind = "cpu"
    elif x.is_cuda:
        kind = "cuda"
    else:
        return None
    name = layer.active_adapter
    if type(name) is not str:
        if len(name) != 1:
            return None
        (name,) = name
    base, As, Bs, dropouts = _parts(layer._modules)
    lora_A = As._modules.get(name)
    if lora_A is None:
        return None
    lora_B, dropout, scaling = Bs._modules[name], dropouts._modules[name], layer.scaling[name]
    if (
        layer.disable_adapters
        or layer.merged
        or "_tp_info" in layer.__dict__
        or "_hf_tp_plan" in base.__dict__
        or type(layer.lora_variant.get(name)) is not MiCALinearVariant
        or type(scaling) is not float
        or not (type(base) is type(lora_A) is type(lora_B) is _LINEAR and type(dropout) is _IDENTITY)
        or any(_GLOBAL_HOOKS)
    ):
        return None
    own = _LINEAR.forward, _IDENTITY.forward, _LINEAR.__call__, _IDENTITY.__call__, functional.linear
    if own != _CODE:
        return None
    for module in (base, lora_A, lora_B, dropout):  # would calling it do more than its class's forward?
        if any(_hooks(module)) or "forward" in module.__dict__:
            return None
    of_base, of_A, of_B = base._parameters, lora_A._parameters, lora_B._parameters
    weight, bias, A, B = of_base.get("weight"), of_base.get("bias"), of_A.get("weight"), of_B.get("weight")
    if of_A["bias"] is not None or of_B["bias"] is not None:
        return None
    tensors = (weight, A, B) if bias is None else (weight, A, B, bias)
    for tensor in tensors:
        if type(tensor) not in TENSOR_TYPES or hasattr(tensor, "ds_id"):
            return None
    if (
        _facts(weight) != _FROZEN
        or _facts(B) != _FROZEN
        or (bias is not None and _facts(bias) != _FROZEN)
        or (A.layout, A.is_meta, A.is_inference(), x.layout, x.is_nested) != _PLAIN
    ):
        return None
    dtype, adapter_dtype = x.dtype, A.dtype
    if torch.is_autocast_enabled(kind):
        for tensor in (x, *tensors):
            if tensor.dtype not in _CAST:
                return None
        return Direct(weight, A, B, scaling, bias, None, torch.get_autocast_dtype(kind))
    if weight.dtype is not dtype or B.dtype is not adapter_dtype or dtype not in FLOATING:
        return None
    if adapter_dtype is not dtype and not (
        adapter_dtype is torch.float32 and dtype in SIXTEEN_BIT and layer.cast_input_dtype_enabled
    ):
        return None
    return Direct(weight, A, B, scaling, bias, compute_dtype(dtype), None)
