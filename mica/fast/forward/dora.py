"""DoRA's linear layers: what the adapter would compute as plain LoRA, then scaled (`mica.ops.dora`).

Nothing of a norm is kept between calls: A and B change at each step, and fused optimizers change no version.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mica.fast.create import quantised
from mica.fast.forward import fast
from mica.fast.forward.eligibility import Adapter, Choices, OnOperators
from mica.fast.forward.layer_calls import Input
from mica.ops import dora, recompute
from mica.ops.operator import autocast_to, is_autocast
from mica.paths.dropout import drawn_seed

# Weights of fewer numbers are small. With a small x as well, this backend's Python takes longer than it
# gains: 24 tokens and 256 x 256 in fp32 took 1.2 to 1.6 times as long as with stock PEFT, 576 x 576 took 0.5
# to 0.8.
SMALL_WEIGHT = 2**18


def why_small(x: Tensor, adapter: Adapter) -> str | None:
    """Why a call is left to PEFT; None if it is not. As in `fast.why_small`, nothing else may count."""
    size = adapter.lora_A.shape[1] * adapter.lora_B.shape[0]
    if x.is_cpu and x.numel() < recompute.MIN_NUMBERS and size < SMALL_WEIGHT and fast.is_free():
        return "a small layer with DoRA and a small input, which PEFT's code computes faster"
    return None


@dataclass
class Scaled(OnOperators):
    """One adapter of DoRA.

    Attributes:
        layer: PEFT's layer.
        adapter: The adapter, as that of plain LoRA.
        magnitude: The norms that are trained, (out_features).
        inner: The layer as with plain LoRA.
        plain: The same without dropout. For an adapter that has some also without the bias, unless the base
            layer is called.
        weight: The base weight, (out_features, in_features); None where it has to be dequantised.
        bias: That of the base layer; None for none.
    """

    layer: nn.Module
    adapter: Adapter
    magnitude: Tensor
    inner: OnOperators
    plain: OnOperators
    weight: Tensor | None
    bias: Tensor | None

    def __post_init__(self) -> None:
        self.why_called = self.inner.why_called

    def __call__(self, x: Tensor) -> Tensor:
        lora_A, lora_B, scaling, dropout_p, _ = self.adapter
        weight = quantised.dequantise(self.layer, "the layer") if self.weight is None else self.weight
        norms = dora.row_norms(weight, lora_A, lora_B, scaling)
        del weight  # a dequantised one

        z_of = self._without_bias if dropout_p else self.plain
        if is_autocast(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            z_of = torch.autocast(x.device.type, dtype)(z_of)  # the backward may call it
            if self.weight is not None:
                x = autocast_to(x, dtype)
        tensors = (lora_A, lora_B, self.weight, self.bias)
        operands = [tensor for tensor in tensors if tensor is not None]
        common = z_of, x, operands, self.magnitude, norms
        if dropout_p == 0.0:
            return dora.scaled(*common, self.bias)
        seed = drawn_seed(dropout_p, x.device)
        return dora.corrected(*common, self.inner(x, seed), dropout_p, seed)

    def _without_bias(self, x: Tensor) -> Tensor:
        z = self.plain(x)
        if self.weight is None and self.bias is not None:
            return z - self.bias
        return z

    def choices(self, x: Input | None) -> Choices:
        return self.inner.choices(x)

    def why_python(self, x: Input | None) -> str | None:
        return "DoRA"
