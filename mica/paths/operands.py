"""The operands of a linear layer, or of a stack of experts, beside its x: one tuple for every path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """What a linear layer, or a stack of experts, is computed with beside its x.

    In a stack of E experts, all tensors but the seed have one dimension more in front.

    Attributes:
        weight: The frozen weight, (out_features, in_features); under autocast perhaps wider than x. None
            where the base layer has been called instead, and in a backward that does not need it.
        lora_A: The trained factor, (rank, in_features).
        lora_B: The factor (out_features, rank), frozen in MiCA and trained in LoRA.
        scaling: lora_alpha / rank.
        bias: The frozen bias, (out_features); None for none.
        compute_dtype: The dtype of the low-rank products; None means that of x.
        dropout_p: The probability, in [0, 1), with which an element of x is dropped.
        seed: An int64 tensor of shape (1,), which determines the mask; None where dropout_p is 0.
        autocast_dtype: The dtype of autocast, where that is on; dA and dB may be rounded to it first.
        trains_B: Whether lora_B may be trained, now or later, so that no copy of it may outlive a call.
        base_output: What a base layer that had to be called has returned, (..., out_features), in the dtype
            of x or another; None where the weight is multiplied, and in a backward.
    """

    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    bias: Tensor | None = None
    compute_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    autocast_dtype: torch.dtype | None = None
    trains_B: bool = False
    base_output: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[-2]

    def low_rank_dtype(self, x: Tensor) -> torch.dtype:
        """That of the low-rank products with this x, or with a gradient of its dtype."""
        return self.compute_dtype or x.dtype

    def dtypes(self, x: Tensor) -> tuple[torch.dtype, ...]:
        """What `mica.paths.choose` decides by: those of y (and x), of the products, of lora_A and lora_B."""
        y = x if self.base_output is None else self.base_output
        return y.dtype, self.low_rank_dtype(x), self.lora_A.dtype, self.lora_B.dtype
