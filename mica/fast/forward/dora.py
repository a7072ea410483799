"""DoRA's linear layers: what the adapter would compute as plain LoRA, then scaled (`mica.ops.dora`).

Nothing of a norm is kept between calls: A and B change at each step, and fused optimizers change no version.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mica.fast.create import quantised
from mica.fast.forward.eligibility import Adapter, Choices, OnOperators
from mica.fast.forward.layer_calls import Input
from mica.ops import dora
from mica.ops.operator import autocast_to, is_autocast
from mica.paths.dropout import drawn_seed


@dataclass
class Scaled(OnOperators):
    """One adapter of DoRA.

    Attributes:
        layer: PEFT's layer.
        adapter: The adapter, as that of plain LoRA.
        magnitude: The norms that are trained, (out_features).
        inner: The layer as with plain LoRA.
        plain: The same without dropout. It adds the bias if ``has_bias``, or if the base layer is called.
        weight: The base weight, (out_features, in_features); None where it has to be dequantised.
        bias: That of the base layer; None for none.
        has_bias: Whether the bias is added before the scaling: without dropout, in 32 bits and more.
    """

    layer: nn.Module
    adapter: Adapter
    magnitude: Tensor
    inner: OnOperators
    plain: OnOperators
    weight: Tensor | None
    bias: Tensor | None
    has_bias: bool

    def __post_init__(self) -> None:
        self.why_called = self.inner.why_called

    def __call__(self, x: Tensor) -> Tensor:
        lora_A, lora_B, scaling, dropout_p, _ = self.adapter
        weight = quantised.dequantise(self.layer, "the layer") if self.weight is None else self.weight
        norms = dora.row_norms(weight, lora_A, lora_B, scaling)
        del weight  # a dequantised one

        if x.dim() == 1:
            x = x.unsqueeze(0)  # PEFT's scale is (1, out_features), and so is what it returns
        if dropout_p == 0.0:
            return dora.scaled(self._unscaled(x), self.magnitude, norms, self.bias, self.has_bias)
        if self.weight is not None and is_autocast(x.device.type):
            x = autocast_to(x, torch.get_autocast_dtype(x.device.type))
        tensors = (lora_A, lora_B, self.weight)
        operands = [tensor for tensor in tensors if tensor is not None]
        seed = drawn_seed(dropout_p, x.device)
        y = self.inner(x, seed)
        return dora.corrected(self._unscaled, x, operands, self.magnitude, norms, y, dropout_p, seed)

    def _unscaled(self, x: Tensor) -> Tensor:
        z = self.plain(x)
        if self.weight is None and self.bias is not None and not self.has_bias:
            return z - self.bias.to(z.dtype)
        return z

    def choices(self, x: Input | None) -> Choices:
        return self.inner.choices(x)

    def why_python(self, x: Input | None) -> str | None:
        return "DoRA"
