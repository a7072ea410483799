"""The forwards of PEFT's LoRA layers over linear layers and embeddings, on the operators of `mica.ops`.

A linear layer has three forms: fused (base product and adapter in one operator, on the base weight itself),
called (the base layer is called, then the adapter's two products run), and PEFT's own (`why_not`).
"""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from mica.fast import calls, common_case, mixed_batch, tensor_parallel
from mica.fast.eligibility import (
    Adapter,
    Operands,
    adapters_for,
    fused_operands,
    read,
    runs_adapter,
    scaled,
    why_not_embedding,
)
from mica.fast.settings import compute_dtype, settings
from mica.ops.embedding import embedding
from mica.ops.factors import down_projection, up_projection
from mica.ops.linear import linear, linear_directly


def linear_forward(stock):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        calls.note(self)
        if settings.enabled:
            if not args and not kwargs:
                result = _linear(self, x)
            elif not args and kwargs.keys() == {"adapter_names"} and kwargs["adapter_names"] is not None:
                result = mixed_batch.forward(self, x, kwargs["adapter_names"])
            else:
                result = "a call with further arguments"
            if type(result) is not str:
                return result
            _note_peft(self, result)
        return stock(self, x, *args, **kwargs)

    return forward


def _note_peft(layer, reason: str) -> None:
    if runs_adapter(layer):
        calls.note_peft(layer, reason)


def _linear(layer, x: torch.Tensor) -> torch.Tensor | str:
    """The output with all active adapters, or why PEFT's own code runs."""
    operands = common_case.operands(layer, x)
    if operands is None:
        return _in_general(layer, x)
    return linear_directly(x, *operands, compute_dtype(x))


def _in_general(layer, x: torch.Tensor) -> torch.Tensor | str:
    """`_linear` of any layer."""
    adapters = adapters_for(layer, x)
    if type(adapters) is str:
        return adapters
    if tensor_parallel.plan_of(layer._modules["base_layer"]) is not None:
        return _sharded(layer, x, adapters)
    operands = fused_operands(layer, x, adapters[0])
    if operands is None:
        result = layer._modules["base_layer"](x)
    else:
        first, *adapters = adapters
        result = _fused(layer, x, operands, first.dropout_p)
    for adapter in adapters:
        result = up_projection(result, *_projected(x, adapter))
    return result


def _sharded(layer, x: torch.Tensor, adapters: list[Adapter]) -> torch.Tensor:
    """`_in_general` on the parts that this process has under tensor parallelism."""
    base = layer._modules["base_layer"]
    plan, group = tensor_parallel.sharding(base)
    is_colwise = plan == "colwise"
    operands = fused_operands(layer, x, adapters[0])
    if operands is None:
        result = base(x)
    else:
        first, *adapters = adapters
        if is_colwise:
            operands = operands._replace(lora_A=tensor_parallel.summed_gradient(operands.lora_A, group))
            result = _fused(layer, tensor_parallel.summed_gradient(x, group), operands, first.dropout_p)
        else:
            bias = operands.bias
            result = _fused(layer, x, operands._replace(bias=None), first.dropout_p)
            result = tensor_parallel.summed(result, group)
            if bias is not None:
                result = result + bias.to(result.dtype)
    for adapter in adapters:
        h, lora_B = _projected(x, adapter)
        h = (tensor_parallel.summed_gradient if is_colwise else tensor_parallel.summed)(h, group)
        result = up_projection(result, h, lora_B)
    return result


def _projected(x: torch.Tensor, adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """h = s·drop(x) Aᵀ, and the lora_B that it is for."""
    lora_B, scaling = scaled(adapter.lora_B, adapter.scaling)
    h = down_projection(x, adapter.lora_A, scaling, compute_dtype(x), *dropout(adapter.dropout_p, x))
    return h, lora_B


def _fused(layer, x: torch.Tensor, operands: Operands, dropout_p: float) -> torch.Tensor:
    weight, lora_A, lora_B, scaling, bias = operands
    if type(layer._modules["base_layer"]) is Conv1D:
        weight = weight.t()  # a view, no copy
    lora_B, scaling = scaled(lora_B, scaling)
    return linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype(x), *dropout(dropout_p, x))


def dropout(p: float, x: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """Probability and a seed from torch's generator: checkpointing restores that, and so the mask."""
    if p == 0.0:
        return 0.0, None
    return p, torch.randint(0, 2**63 - 1, (1,), device=x.device)


def whole_forward(stock):
    """For PEFT's model and its tuner: one of them is around every forward of the whole model."""

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return stock(self, *args, **kwargs)
        with calls.counting(self):
            return stock(self, *args, **kwargs)

    return forward


def embedding_forward(stock):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        calls.note(self)
        if settings.enabled:
            result = "a call with further arguments" if args or kwargs else _embedding(self, x)
            if type(result) is not str:
                return result
            _note_peft(self, result)
        return stock(self, x, *args, **kwargs)

    return forward


def _embedding(layer, x: torch.Tensor) -> torch.Tensor | str:
    """The output with the active adapter, or why PEFT's own code runs."""
    adapters = read(layer)
    if type(adapters) is str:
        return adapters
    (adapter,) = adapters
    lora_A, (lora_B, scaling) = adapter.lora_A, scaled(adapter.lora_B, adapter.scaling)
    reason = why_not_embedding(x, lora_A, lora_B)
    if reason is not None:
        return reason
    result = layer.base_layer(x)
    update = embedding(x, lora_A, lora_B, scaling, layer.base_layer.padding_idx, None)
    embed_scale = layer._get_embed_scale()  # Gemma's embeddings scale their output
    if embed_scale is not None:
        update = update * embed_scale.to(update.dtype)
    return (result + update).to(result.dtype)
