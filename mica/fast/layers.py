"""The forwards of PEFT's LoRA layers over linear layers and embeddings, on the operators of `mica.ops`.

Three forms of a linear layer's: fused (base product and adapter in one operator, on the base weight itself),
beside (the base layer is called, then the adapter's two products), and PEFT's own where `why_not` says so.
"""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from mica import ops
from mica.backend import MAX_RANK
from mica.fast import calls, common_case, grouping, mixed_batch
from mica.fast.common_case import Operands
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
    found = common_case.operands(layer, x)
    if found is None:
        return _in_general(layer, x)
    if grouping.is_on(x, found.lora_A):
        return _grouped(layer, found, x)
    weight, bias, lora_A, lora_B, scaling = found
    return ops.linear_directly(x, weight, lora_A, lora_B, scaling, bias, compute_dtype(x))


def _in_general(layer, x: torch.Tensor) -> torch.Tensor | None:
    """`_linear` of any layer."""
    adapters = read(layer)
    if type(adapters) is str:
        return None
    for adapter in adapters:
        if not dtypes_fit(layer, x, adapter.lora_A, adapter.lora_B):
            return None
    base = layer._modules["base_layer"]
    if why_called(layer) is None and fuses(x, weight_of(base)):
        first, *adapters = adapters
        found = _operands(base, first)
        if adapters or first.dropout_p or not grouping.is_on(x, first.lora_A):
            result = _fused(base, found, x, first.dropout_p)
        else:
            result = _grouped(layer, found, x)
    else:
        result = base(x)
    for adapter in adapters:
        lora_A, lora_B, scaling = factors(adapter.lora_A, adapter.lora_B, adapter.scaling)
        h = ops.down_projection(x, lora_A, scaling, compute_dtype(x), *_dropout(adapter.dropout_p, x))
        result = ops.up_projection(result, h, lora_B)
    return result


def _operands(base, adapter: Adapter) -> Operands:
    bias = weight_of(base, "bias")
    return Operands(weight_of(base), bias, adapter.lora_A, adapter.lora_B, adapter.scaling)


def _ready(base, found: Operands) -> tuple:
    """Weight (out_features, in_features), bias, lora_A, lora_B and scaling, as the operators take them."""
    weight, bias, lora_A, lora_B, scaling = found
    if type(base) is Conv1D:
        weight = weight.t()  # a view, no copy
    return weight, bias, *factors(lora_A, lora_B, scaling)


def _fused(base, found: Operands, x: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
    weight, bias, lora_A, lora_B, scaling = _ready(base, found)
    return ops.linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype(x), *_dropout(dropout_p, x))


def _grouped(layer, found: Operands, x: torch.Tensor) -> torch.Tensor:
    """`_fused`, and the outputs of the layers that will read the same x where `grouping` knows them."""
    output = grouping.fetch(layer, found, x)
    if output is not None:
        return output
    layers = grouping.members(layer)
    together = None if layers is None else _fit_together(layers, found, x)
    if together is None:
        output = _fused(layer.base_layer, found, x)
        grouping.observe(layer, x, output)
        return output
    ready = (_ready(member.base_layer, operands) for member, operands in zip(layers, together, strict=True))
    weights, biases, lora_As, lora_Bs, scalings = map(list, zip(*ready, strict=True))
    outputs = start_group(x, weights, lora_As, lora_Bs, scalings, biases, compute_dtype(x))
    return grouping.lead(layers, together, x, outputs)


def _fit_together(layers, first: Operands, x: torch.Tensor) -> list[Operands] | None:
    """Their operands, if all of them would run fused and alone on x, and nothing hangs on the call of one.

    ``first``: the operands of the first layer, which is known to run so.
    """
    together = []
    for layer in layers:
        if hangs_on_call(layer):
            return None
        found = _alone(layer, x) if together else first
        if found is None or found.lora_A.device != x.device:
            return None
        if not found.lora_A.requires_grad:  # its output need not require a gradient, but a group's would
            return None
        together.append(found)
    return together if stacked_rank([found.lora_A for found in together]) <= MAX_RANK else None


def _alone(layer, x: torch.Tensor) -> Operands | None:
    """Of a layer that runs fused on x, with one adapter and without dropout."""
    found = common_case.operands(layer, x)
    if found is not None:
        return found
    adapters = read(layer)
    if type(adapters) is str or len(adapters) > 1 or why_called(layer) is not None:
        return None
    (adapter,), base = adapters, layer.base_layer
    fits = dtypes_fit(layer, x, adapter.lora_A, adapter.lora_B) and fuses(x, weight_of(base))
    return _operands(base, adapter) if fits and not adapter.dropout_p else None


def _dropout(p: float, x: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """Its probability, and a seed of torch's generator: checkpointing restores that, and so the mask."""
    if p == 0.0:
        return 0.0, None
    return p, torch.randint(0, 2**63 - 1, (1,), device=x.device)


def whole_forward(stock):
    """Of PEFT's model or its tuner: one of them is around every forward of the whole model."""

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return stock(self, *args, **kwargs)
        try:
            with calls.counting(self):
                return stock(self, *args, **kwargs)
        finally:
            grouping.forget_pending()

    return forward


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
    (adapter,) = adapters
    lora_A, lora_B, scaling = factors(adapter.lora_A, adapter.lora_B, adapter.scaling)
    if not embedding_fits(x, lora_A, lora_B):
        return None
    result = layer.base_layer(x)
    update = ops.embedding(x, lora_A, lora_B, scaling, layer.base_layer.padding_idx, None)
    embed_scale = layer._get_embed_scale()  # Gemma's embeddings scale their output
    if embed_scale is not None:
        update = update * embed_scale.to(update.dtype)
    return (result + update).to(result.dtype)


def factors(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling) -> tuple[torch.Tensor, torch.Tensor, float]:
    """lora_A, lora_B and the scaling for the operators.

    PEFT's compiled hotswap makes the scaling a tensor so that a new value needs no new graph: then it goes
    into B.
    """
    if isinstance(scaling, torch.Tensor):
        return lora_A, lora_B * scaling.to(lora_B.dtype), 1.0
    return lora_A, lora_B, float(scaling)
