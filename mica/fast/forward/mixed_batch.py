"""One batch, a different adapter for each sample: PEFT's ``adapter_names``, for inference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mica.fast.forward import tensor_parallel
from mica.fast.forward.eligibility import Adapter
from mica.fast.settings import compute_dtype
from mica.ops.low_rank import down_projection, up_projection

BASE = "__base__"  # PEFT's name for "no adapter"


def names_on(layer, x: Tensor, adapter_names: list[str]) -> list[str] | str:
    """The adapters of this layer that the samples have, or why the call is PEFT's."""
    names = [name for name in dict.fromkeys(adapter_names) if name != BASE and name in layer.lora_A]
    if not names or len(x) != len(adapter_names):
        return "a mixed batch without an adapter of this layer"
    if torch.compiler.is_compiling():
        return "a compiled mixed batch"
    if tensor_parallel.plan_of(layer.get_base_layer()) is not None:
        return "a mixed batch under tensor parallelism"
    if any(layer.lora_dropout[name].training for name in names):
        return "a mixed batch with dropout in training mode"
    return names


class MixedBatch(NamedTuple):
    """A linear layer on x (batch, ..., in_features), with a different adapter for each sample."""

    layer: nn.Module
    adapter_names: list[str]  # one per sample; "__base__" and unknown ones add nothing
    adapters: dict[str, Adapter]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.layer.base_layer(x)
        rows, outputs = [], []
        for name, (lora_A, lora_B, scaling, _) in self.adapters.items():
            index = [row for row, other in enumerate(self.adapter_names) if other == name]
            samples = torch.tensor(index, device=x.device)
            h = down_projection(x[samples], lora_A, scaling, compute_dtype(x.dtype), 0.0, None)
            outputs.append(up_projection(y[samples], h, lora_B))
            rows.append(samples)
        return y.index_copy(0, torch.cat(rows), torch.cat(outputs))
