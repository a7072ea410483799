"""The operands of a linear layer, or of a stack of experts, beside its x: one tuple for every path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """Shapes are those of a layer; of a stack (E experts) all but the seed have one dimension more in front.

    In a backward ``weight`` is None where x needs no gradient.
    """

    weight: Tensor | None  # (out_features, in_features), frozen; under autocast perhaps wider than x
    lora_A: Tensor  # (rank, in_features), trained
    lora_B: Tensor  # (out_features, rank): frozen in MiCA, trained in LoRA
    scaling: float = 1.0
    bias: Tensor | None = None  # (out_features), frozen
    compute_dtype: torch.dtype | None = None  # of the low-rank products; None: that of x
    dropout_p: float = 0.0  # in [0, 1)
    seed: Tensor | None = None  # int64 (1), where dropout_p > 0
    autocast_dtype: torch.dtype | None = None  # where autocast is on; dA and dB may be rounded to it first
    trains_B: bool = False  # lora_B may be trained, now or later: no copy of it outlives a call

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[-2]

    def dtype(self, x: Tensor) -> torch.dtype:
        """That of the low-rank products with this x, or with a gradient of its dtype."""
        return self.compute_dtype or x.dtype

    def dtypes(self, x: Tensor) -> tuple[torch.dtype, ...]:
        """What `mica.paths.choose` decides by: those of x, of the products, of lora_A and lora_B."""
        return x.dtype, self.dtype(x), self.lora_A.dtype, self.lora_B.dtype
