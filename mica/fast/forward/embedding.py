"""The forward of PEFT's LoRA layer over an embedding, on `mica.ops.embedding`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mica import backend
from mica.fast.forward.decide import decided, is_dense
from mica.fast.forward.decision import REFERENCE, OnOperators, OnPeft
from mica.fast.forward.eligibility import Adapter, read_adapters
from mica.ops.embedding import embedding


@dataclass
class Embedded(OnOperators):
    """The base layer is called, and the adapter's rows, one operator, are added to its output."""

    layer: nn.Module
    adapter: Adapter

    def __call__(self, x: Tensor) -> Tensor:
        lora_A, lora_B, scaling, _ = self.adapter
        result = self.layer.base_layer(x)
        update = embedding(x, lora_A, lora_B, scaling, self.layer.base_layer.padding_idx, None)
        embed_scale = self.layer._get_embed_scale()  # Gemma's embeddings scale their output
        if embed_scale is not None:
            update = update * embed_scale.to(update.dtype)
        return (result + update).to(result.dtype)

    def explained(self) -> tuple[str, str]:
        lora_A, lora_B, *_ = self.adapter
        refused = backend.why_not_kernels(lora_A.device, lora_A.shape[0], lora_A.dtype, lora_B.dtype)
        return REFERENCE, refused or "embeddings have no kernels"


def decide(layer, x: Tensor | None = None, *args, **kwargs) -> Embedded | OnPeft:
    """How an embedding runs, with its active adapter."""
    adapters = "a call with further arguments" if args or kwargs else read_adapters(layer)
    if type(adapters) is str:
        return OnPeft(adapters)
    (adapter,) = adapters
    reason = None if x is None else _why_not_call(x, adapter.lora_A, adapter.lora_B)
    return Embedded(layer, adapter) if reason is None else OnPeft(reason)


def _why_not_call(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """PEFT computes an embedding's adapter in the adapter's dtype or autocast's."""
    if not is_dense(x):
        return "indices that are not a plain tensor"
    if torch.is_autocast_enabled(x.device.type):
        fits = torch.float64 not in (lora_A.dtype, lora_B.dtype)
    else:
        fits = lora_A.dtype == lora_B.dtype
    return None if fits else f"lora_A of {lora_A.dtype} and lora_B of {lora_B.dtype}"


embedding_forward = decided(decide)
