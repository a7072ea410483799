"""The forwards of PEFT's `lora.Linear` and `lora.Embedding`, on the operators of `mica.ops`."""

from __future__ import annotations

import torch
from peft.tuners import lora
from transformers.pytorch_utils import Conv1D

import mica.ops  # noqa: F401  (registers torch.ops.mica)
from mica.fast.eligibility import adapter_of, dtypes_fit, why_not
from mica.fast.settings import settings


def linear_forward(stock):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if (
            settings.enabled
            and type(self) is lora.Linear
            and not args
            and not kwargs
            and why_not(self) is None
        ):
            name, base = adapter_of(self), self.base_layer
            # Conv1D keeps its weight as (in_features, out_features): a transposed view, no copy.
            weight = base.weight.t() if type(base) is Conv1D else base.weight
            lora_A, lora_B = self.lora_A[name].weight, self.lora_B[name].weight
            if dtypes_fit(self, x, weight, lora_A, lora_B):
                lora_B, scaling = _fold_tensor_scaling(lora_B, self.scaling[name])
                dtype = settings.compute_dtype
                if dtype is not None:
                    dtype = torch.promote_types(dtype, x.dtype)
                return torch.ops.mica.linear(x, weight, lora_A, lora_B, scaling, base.bias, dtype)
        return stock(self, x, *args, **kwargs)

    return forward


def embedding_forward(stock):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if (
            settings.enabled
            and type(self) is lora.Embedding
            and not args
            and not kwargs
            and why_not(self) is None
        ):
            name, base = adapter_of(self), self.base_layer
            lora_A, lora_B = self.lora_embedding_A[name], self.lora_embedding_B[name]
            lora_B, scaling = _fold_tensor_scaling(lora_B, self.scaling[name])
            result = base(x)
            update = torch.ops.mica.embedding(x, lora_A, lora_B, scaling, base.padding_idx, None)
            embed_scale = self._get_embed_scale()  # Gemma's embeddings scale their output
            if embed_scale is not None:
                update = update * embed_scale.to(update.dtype)
            return (result + update).to(result.dtype)
        return stock(self, x, *args, **kwargs)

    return forward


def _fold_tensor_scaling(lora_B: torch.Tensor, scaling) -> tuple[torch.Tensor, float]:
    """PEFT's compiled hotswap makes the scaling a tensor so that a new value needs no new graph."""
    if isinstance(scaling, torch.Tensor):
        return lora_B * scaling.to(lora_B.dtype), 1.0
    return lora_B, float(scaling)
