"""PEFT's adapters of single parameters (`lora.ParamWrapper`) as matrices per expert: views, never copies.

A stack of experts is a 3-d parameter, (E, out_features, in_features) or, where the module around it says
``is_transposed``, (E, in_features, out_features). PEFT stores its lora_A as (E·r, in_features), expert by
expert, and its lora_B as (out_features, r·E), in which the expert runs fastest. A 2-d parameter (a router,
the weight of a linear layer) is a stack of one matrix, (out_features, in_features).
"""

from __future__ import annotations

from peft.tuners import lora
from torch import Tensor

from mica.fast.forward.eligibility import weight_of

# None if PEFT has none: `patching` then warns, and nothing here is reached.
ParamWrapper = getattr(lora.layer, "ParamWrapper", None)


def is_wrapper(layer) -> bool:
    """Whether the layer adapts one parameter of a module, of any shape."""
    return type(layer) is ParamWrapper


def is_stack(layer) -> bool:
    """Whether the layer adapts a stack of experts, a 3-d parameter."""
    return type(layer) is ParamWrapper and _dimensions(layer) == 3


def _dimensions(layer) -> int:
    known = layer.__dict__.get("_param_ndim")  # PEFT 0.20 has none
    return parameter_of(layer).dim() if known is None else known


def is_stored_as_in_out(layer) -> bool:
    """Whether the stack is stored as (E, in_features, out_features)."""
    return _dimensions(layer) == 3 and not layer._did_swap_in_out_features


def weight_name(layer) -> str:
    """The name of the parameter that a LoRA layer of any kind adapts, in its base layer."""
    return layer.parameter_name if type(layer) is ParamWrapper else "weight"


def parameter_of(layer) -> Tensor:
    """The adapted parameter as stored."""
    return weight_of(layer.get_base_layer(), layer.parameter_name)


def weight_of_stack(layer) -> Tensor:
    """A view (E, out_features, in_features) of the adapted parameter."""
    parameter = parameter_of(layer)
    if _dimensions(layer) == 2:
        return parameter.unsqueeze(0)
    return parameter if layer._did_swap_in_out_features else parameter.transpose(1, 2)


def as_lora_B(weight: Tensor, num_experts: int) -> Tensor:  # noqa: N802
    """A view (E, out_features, r) of lora_B.weight (out_features, r·E), with strides (1, r·E, E)."""
    return weight.view(weight.shape[0], -1, num_experts).permute(2, 0, 1)


def lora_A_of(layer, name: str) -> Tensor:  # noqa: N802
    """A view (E, r, in_features) of the named adapter's lora_A."""
    weight = weight_of(layer._modules["lora_A"]._modules[name])  # (E·r, in_features)
    return weight.view(layer.num_experts, -1, weight.shape[1])


def lora_B_of(layer, name: str) -> Tensor:  # noqa: N802
    """A view (E, out_features, r) of the named adapter's lora_B; writing to it writes to the adapter."""
    return as_lora_B(weight_of(layer._modules["lora_B"]._modules[name]), layer.num_experts)
