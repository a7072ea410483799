"""When a layer may run on this backend. Every other layer runs PEFT's own code, and the reason is said.

The backend reads the base weight directly instead of calling the base layer, so anything that hangs on
that call (hooks, parametrizations, offloading, sharding) keeps a layer on PEFT's path. The checks are
cheap (measured: see bench), free of side effects and traceable by torch.compile.
"""

from __future__ import annotations

import torch
from peft.tuners import lora
from peft.tuners.lora import variants
from torch import nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

_PLAIN = (torch.Tensor, nn.Parameter)

# None in a PEFT that has moved them: `patching` then says so and nothing here is reached.
MiCALinearVariant = getattr(variants, "MiCALinearVariant", None)
MiCAEmbeddingVariant = getattr(variants, "MiCAEmbeddingVariant", None)


def adapter_of(layer) -> str | None:
    """The one active adapter that this layer has, or None if there are none or several."""
    adapters = layer.lora_A if type(layer) is lora.Linear else layer.lora_embedding_A
    names = [name for name in layer.active_adapters if name in adapters]
    return names[0] if len(names) == 1 else None


def adapter_weights(layer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B of one adapter, wherever the kind of layer keeps them."""
    if isinstance(layer, lora.Embedding):
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def is_stored_transposed(layer) -> bool:
    """Whether the base weight is kept as (in_features, out_features) or (num_embeddings, embedding_dim)."""
    return isinstance(layer, lora.Embedding) or layer.fan_in_fan_out


def why_not(layer) -> str | None:
    """None if the layer's state allows the fast path, else the reason in words."""
    if type(layer) is lora.Linear:
        return _why_not_adapter(layer, MiCALinearVariant) or _why_not_linear(layer, adapter_of(layer))
    if type(layer) is lora.Embedding:
        return _why_not_adapter(layer, MiCAEmbeddingVariant) or _why_not_embedding(layer, adapter_of(layer))
    return f"layers of type {type(layer).__module__}.{type(layer).__name__} are not covered"


def _why_not_adapter(layer, variant) -> str | None:
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "the adapter is merged into the weight"
    name = adapter_of(layer)
    if name is None:
        return f"exactly one active adapter is needed, active are {list(layer.active_adapters)}"
    if type(layer.lora_variant.get(name)) is not variant:
        return f"adapter {name!r} is not MiCA"
    if not isinstance(layer.scaling[name], (float, int, torch.Tensor)):
        return "its scaling is neither a number nor a tensor"
    if (
        getattr(layer, "_tp_info", None) is not None
        or getattr(layer.base_layer, "_hf_tp_plan", None) is not None
    ):
        return "tensor parallelism"
    return None


def _why_not_linear(layer, name: str) -> str | None:
    base, lora_A, lora_B = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"a base layer of type {type(base).__name__}"
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return "the adapter's modules are not plain nn.Linear"
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0.0:
        return "lora_dropout > 0 in training"
    if lora_B.bias is not None:
        return "lora_bias=True"
    for part, module in (("base layer", base), ("lora_A", lora_A), ("lora_B", lora_B)):
        reason = _why_not_read_directly(part, module)
        if reason is not None:
            return reason
    if _global_hooks():
        return "global module hooks are registered"
    frozen = (("base weight", base.weight), ("base bias", base.bias), ("lora_B", lora_B.weight))
    return _why_not_tensors(frozen, lora_A.weight)


def _why_not_embedding(layer, name: str) -> str | None:
    base = layer.base_layer
    if not isinstance(base, nn.Embedding):
        return f"a base layer of type {type(base).__name__}"
    if base.max_norm is not None:
        return "an embedding with max_norm"
    if base.scale_grad_by_freq or base.sparse:
        return "an embedding with scale_grad_by_freq or sparse gradients"
    if layer.input_fns or layer.output_fns:
        return "tensor parallelism"
    frozen = (("base weight", base.weight), ("lora_B", layer.lora_embedding_B[name]))
    return _why_not_tensors(frozen, layer.lora_embedding_A[name])


def _why_not_read_directly(part: str, module: nn.Module) -> str | None:
    """A call of the module would do more than its formula: then it has to be called."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"hooks on the {part}"
    if "forward" in module.__dict__:
        return f"the {part} has a forward of its own (offloading or another patch)"
    return None


def _global_hooks() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def _why_not_tensors(frozen, lora_A) -> str | None:
    for part, tensor in (*frozen, ("lora_A", lora_A)):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN:
            return f"the {part} is a {type(tensor).__name__}, not a plain tensor"
        if tensor.is_meta or hasattr(tensor, "ds_id"):
            return f"the {part} is offloaded or partitioned"
        if not tensor.is_floating_point():
            return f"the {part} has dtype {tensor.dtype}"
    for part, tensor in frozen:
        if tensor is not None and tensor.requires_grad:
            return f"the {part} is trainable"
    return None


def dtypes_fit(
    layer, x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor
) -> bool:
    """Whether PEFT would compute this call in a dtype that the operator has too.

    Without autocast: activations and base weight of one dtype, and adapters of that dtype or fp32 masters
    of 16-bit activations (that PEFT is allowed to cast to). With autocast: everything but fp64.
    """
    if type(x) not in _PLAIN or not x.is_floating_point():
        return False
    if torch.is_autocast_enabled(x.device.type):
        return torch.float64 not in (x.dtype, weight.dtype, lora_A.dtype, lora_B.dtype)
    if x.dtype != weight.dtype or lora_A.dtype != lora_B.dtype:
        return False
    if lora_A.dtype == x.dtype:
        return True
    return (
        lora_A.dtype == torch.float32
        and x.dtype in (torch.bfloat16, torch.float16)
        and layer.cast_input_dtype_enabled
    )
