"""The forwards of PEFT's LoRA layers over linear layers and embeddings, on the operators of `mica.ops`.

Three forms of a linear layer's: fused (base product and adapter in one operator, on the base weight itself),
beside (the base layer is called, then the adapter's two products), and PEFT's own where `why_not` says so.
"""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from mica import ops
from mica.backend import MAX_RANK
from mica.fast import calls, grouping, mixed_batch
from mica.fast.eligibility import (
    Adapter,
    dtypes_fit,
    embedding_fits,
    fuses,
    hangs_on_call,
    read,
    weight_of,
    why_called,
)
from mica.fast.settings import compute_dtype, settings
from mica.group_ops import stacked_rank, start_group


def linear_forward(stock):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        calls.note(self)
        if settings.enabled and not args:
            if not kwargs:
                result = _linear(self, x)
            elif kwargs.keys() == {"adapter_names"} and kwargs["adapter_names"] is not None:
                result = mixed_batch.forward(self, x, kwargs["adapter_names"])
            else:
                result = None
            if result is not None:
                return result
        return stock(self, x, *args, **kwargs)

    return forward


def _linear(layer, x: torch.Tensor) -> torch.Tensor | None:
    """The output with all active adapters, or None where the layer is PEFT's."""
    adapters = read(layer)
    if type(adapters) is str:
        return None
    for adapter in adapters:
        if not dtypes_fit(layer, x, adapter.lora_A, adapter.lora_B):
            return None
    base = layer._modules["base_layer"]
    if why_called(layer) is None and fuses(x, weight_of(base)):
        first, *adapters = adapters
        result = _fused(base, first, x) if adapters else _grouped(layer, base, first, x)
    else:
        result = base(x)
    for adapter in adapters:
        lora_A, lora_B, scaling = operands(adapter)
        p, seed = _dropout(adapter, x)
        h = ops.down_projection(x, lora_A, scaling, compute_dtype(x), p, seed)
        result = ops.up_projection(result, h, lora_B)
    return result


def _fused(base, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    weight, bias = _base(base)
    lora_A, lora_B, scaling = operands(adapter)
    p, seed = _dropout(adapter, x)
    return ops.linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype(x), p, seed)


def _base(base) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (out_features, in_features) and bias. Conv1D's weight is a transposed view, no copy."""
    weight = weight_of(base)
    return weight.t() if type(base) is Conv1D else weight, weight_of(base, "bias")


def _grouped(layer, base, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """`_fused`, and the outputs of the layers that will read the same x where `grouping` knows them."""
    if not grouping.is_on(x, adapter.lora_A) or adapter.dropout_p:
        return _fused(base, adapter, x)
    output = grouping.fetch(layer, adapter, x)
    if output is not None:
        return output
    layers = grouping.members(layer)
    adapters = None if layers is None else _fit_together(layers, x)
    if adapters is None:
        output = _fused(base, adapter, x)
        grouping.observe(layer, x, output)
        return output
    weights, biases = zip(*(_base(member.base_layer) for member in layers), strict=True)
    factors = zip(*map(operands, adapters), strict=True)
    lists = (list(kind) for kind in (weights, *factors, biases))
    return grouping.lead(layers, adapters, x, start_group(x, *lists, compute_dtype(x)))


def _fit_together(layers, x: torch.Tensor) -> list[Adapter] | None:
    """Their adapters, if all of them would run fused and alone on x, and nothing hangs on the call of one."""
    found = []
    for layer in layers:
        adapters = None if hangs_on_call(layer) else read(layer)
        if type(adapters) is not list or len(adapters) > 1 or why_called(layer) is not None:
            return None
        (adapter,) = adapters
        if adapter.dropout_p or adapter.lora_A.device != x.device:
            return None
        if not fuses(x, weight_of(layer.base_layer)):
            return None
        if not dtypes_fit(layer, x, adapter.lora_A, adapter.lora_B):
            return None
        if not adapter.lora_A.requires_grad:  # its output need not require a gradient, but a group's would
            return None
        found.append(adapter)
    return found if stacked_rank([adapter.lora_A for adapter in found]) <= MAX_RANK else None


def _dropout(adapter: Adapter, x: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """Its probability, and a seed of torch's generator: checkpointing restores that, and so the mask."""
    if adapter.dropout_p == 0.0:
        return 0.0, None
    return adapter.dropout_p, torch.randint(0, 2**63 - 1, (1,), device=x.device)


def embedding_forward(stock):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        calls.note(self)
        if settings.enabled and not args and not kwargs:
            result = _embedding(self, x)
            if result is not None:
                return result
        return stock(self, x, *args, **kwargs)

    return forward


def _embedding(layer, x: torch.Tensor) -> torch.Tensor | None:
    """The output with the active adapter, or None where the layer is PEFT's."""
    adapters = read(layer)
    if type(adapters) is str:
        return None
    lora_A, lora_B, scaling = operands(adapters[0])
    if not embedding_fits(x, lora_A, lora_B):
        return None
    result = layer.base_layer(x)
    update = ops.embedding(x, lora_A, lora_B, scaling, layer.base_layer.padding_idx, None)
    embed_scale = layer._get_embed_scale()  # Gemma's embeddings scale their output
    if embed_scale is not None:
        update = update * embed_scale.to(update.dtype)
    return (result + update).to(result.dtype)


def operands(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor, float]:
    """lora_A, lora_B and the scaling of one adapter, for the operators.

    PEFT's compiled hotswap makes the scaling a tensor so that a new value needs no new graph: then it goes
    into B.
    """
    _, lora_A, lora_B, scaling, _ = adapter
    if isinstance(scaling, torch.Tensor):
        return lora_A, lora_B * scaling.to(lora_B.dtype), 1.0
    return lora_A, lora_B, float(scaling)
