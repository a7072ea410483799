"""The forwards of PEFT's LoRA layers over linear layers and embeddings, on the operators of `mica.ops`.

Three forms of a linear layer's: fused (base product and adapter in one operator, on the base weight itself),
beside (the base layer is called, then the adapter's two products), and PEFT's own where `why_not` says so.
"""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

import mica.ops  # noqa: F401  (registers torch.ops.mica)
from mica.backend import MAX_RANK
from mica.fast import calls, grouping, mixed_batch
from mica.fast.eligibility import (
    adapter_weights,
    adapters_of,
    dtypes_fit,
    embedding_fits,
    fuses,
    hangs_on_call,
    why_called,
    why_not,
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
    if why_not(layer) is not None:
        return None
    names = adapters_of(layer)
    for name in names:
        if not dtypes_fit(layer, x, *adapter_weights(layer, name)):
            return None
    if why_called(layer) is None and fuses(x, layer.base_layer.weight):
        name, *names = names
        result = _fused(layer, name, x) if names else _grouped(layer, name, x)
    else:
        result = layer.base_layer(x)
    for name in names:
        lora_A, lora_B, scaling = operands(layer, name)
        p, seed = _dropout(layer, name, x)
        h = torch.ops.mica.down_projection(x, lora_A, scaling, compute_dtype(x), p, seed)
        result = torch.ops.mica.up_projection(result, h, lora_B)
    return result


def _fused(layer, name: str, x: torch.Tensor) -> torch.Tensor:
    lora_A, lora_B, scaling = operands(layer, name)
    p, seed = _dropout(layer, name, x)
    weight, bias = _base(layer)
    return torch.ops.mica.linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype(x), p, seed)


def _base(layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (out_features, in_features) and bias. Conv1D's weight is a transposed view, no copy."""
    base = layer.base_layer
    return base.weight.t() if type(base) is Conv1D else base.weight, base.bias


def _grouped(layer, name: str, x: torch.Tensor) -> torch.Tensor:
    """`_fused`, and the outputs of the layers that will read the same x where `grouping` knows them."""
    if not grouping.is_on(x, layer.lora_A[name].weight) or _has_dropout(layer, name):
        return _fused(layer, name, x)
    output = grouping.fetch(layer, name, x)
    if output is not None:
        return output
    layers = grouping.members(layer)
    names = None if layers is None else _fit_together(layers, x)
    if names is None:
        output = _fused(layer, name, x)
        grouping.observe(layer, x, output)
        return output
    adapters = zip(*map(operands, layers, names), strict=True)
    weights, biases = zip(*map(_base, layers), strict=True)
    lists = (list(kind) for kind in (weights, *adapters, biases))
    return grouping.lead(layers, names, x, start_group(x, *lists, compute_dtype(x)))


def _fit_together(layers, x: torch.Tensor) -> list[str] | None:
    """Their adapters, if all of them would run fused and alone on x, and nothing hangs on the call of one."""
    adapters, lora_As = [], []
    for layer in layers:
        if hangs_on_call(layer) or why_not(layer) is not None or why_called(layer) is not None:
            return None
        names = adapters_of(layer)
        lora_A, lora_B = adapter_weights(layer, names[0])
        if len(names) > 1 or _has_dropout(layer, names[0]) or lora_A.device != x.device:
            return None
        if not fuses(x, layer.base_layer.weight) or not dtypes_fit(layer, x, lora_A, lora_B):
            return None
        if not lora_A.requires_grad:  # its output need not require a gradient, but a group's would
            return None
        adapters.append(names[0])
        lora_As.append(lora_A)
    return adapters if stacked_rank(lora_As) <= MAX_RANK else None


def _has_dropout(layer, name: str) -> bool:
    dropout = layer.lora_dropout[name]
    return dropout.training and getattr(dropout, "p", 0.0) > 0.0


def _dropout(layer, name: str, x: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """Its probability, and a seed of torch's generator: checkpointing restores that, and so the mask."""
    if not _has_dropout(layer, name):
        return 0.0, None
    return layer.lora_dropout[name].p, torch.randint(0, 2**63 - 1, (1,), device=x.device)


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
    if why_not(layer) is not None:
        return None
    lora_A, lora_B, scaling = operands(layer, adapters_of(layer)[0])
    if not embedding_fits(x, lora_A, lora_B):
        return None
    result = layer.base_layer(x)
    update = torch.ops.mica.embedding(x, lora_A, lora_B, scaling, layer.base_layer.padding_idx, None)
    embed_scale = layer._get_embed_scale()  # Gemma's embeddings scale their output
    if embed_scale is not None:
        update = update * embed_scale.to(update.dtype)
    return (result + update).to(result.dtype)


def operands(layer, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """lora_A, lora_B and the scaling of one adapter, for the operators.

    PEFT's compiled hotswap makes the scaling a tensor so that a new value needs no new graph: then it goes
    into B.
    """
    lora_A, lora_B = adapter_weights(layer, name)
    scaling = layer.scaling[name]
    if isinstance(scaling, torch.Tensor):
        return lora_A, lora_B * scaling.to(lora_B.dtype), 1.0
    return lora_A, lora_B, float(scaling)
