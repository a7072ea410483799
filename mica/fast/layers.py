"""The forwards of PEFT's LoRA layers over linear layers and embeddings, on the operators of `mica.ops`.

Three forms of a linear layer's: fused (base product and adapter in one operator, on the base weight itself),
beside (the base layer is called, then the adapter's two products), and PEFT's own where `why_not` says so.
"""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

import mica.ops  # noqa: F401  (registers torch.ops.mica)
from mica.fast import mixed_batch
from mica.fast.eligibility import adapter_weights, adapters_of, dtypes_fit, fuses, why_called, why_not
from mica.fast.settings import compute_dtype, settings


def linear_forward(stock):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
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
    base = layer.base_layer
    if why_called(layer) is not None or not fuses(x, base.weight):
        result = base(x)
    else:
        # Conv1D keeps its weight as (in_features, out_features): a transposed view, no copy.
        weight = base.weight.t() if type(base) is Conv1D else base.weight
        name, *names = names
        lora_A, lora_B, scaling = operands(layer, name)
        p, seed = _dropout(layer, name, x)
        result = torch.ops.mica.linear(
            x, weight, lora_A, lora_B, scaling, base.bias, compute_dtype(x), p, seed
        )
    for name in names:
        lora_A, lora_B, scaling = operands(layer, name)
        p, seed = _dropout(layer, name, x)
        h = torch.ops.mica.down_projection(x, lora_A, scaling, compute_dtype(x), p, seed)
        result = torch.ops.mica.up_projection(result, h, lora_B)
    return result


def _dropout(layer, name: str, x: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """Its probability, and a seed of torch's generator: checkpointing restores that, and so the mask."""
    p = getattr(layer.lora_dropout[name], "p", 0.0) if layer.lora_dropout[name].training else 0.0
    if p == 0.0:
        return 0.0, None
    return p, torch.randint(0, 2**63 - 1, (1,), device=x.device)


def embedding_forward(stock):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if settings.enabled and not args and not kwargs and why_not(self) is None:
            base = self.base_layer
            lora_A, lora_B, scaling = operands(self, adapters_of(self)[0])
            result = base(x)
            update = torch.ops.mica.embedding(x, lora_A, lora_B, scaling, base.padding_idx, None)
            embed_scale = self._get_embed_scale()  # Gemma's embeddings scale their output
            if embed_scale is not None:
                update = update * embed_scale.to(update.dtype)
            return (result + update).to(result.dtype)
        return stock(self, x, *args, **kwargs)

    return forward


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
