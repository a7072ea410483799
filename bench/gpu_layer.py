"""One MiCA linear layer on a GPU and its rivals: the same operands, each forward and backward a closure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.layer import Layer, adapted_module
from mica import kernel_path
from mica.kernels.common import target_of
from mica.kernels.fused_linear import why_not_descriptor
from mica.ops import mica_linear

BARE, SPLIT, ATEN = "bare GEMM", "mica split", "aten control (addmm_)"
STOCK, STOCK_16, COMPILED = (
    "stock PEFT default",
    "stock PEFT 16-bit adapters",
    "torch.compile'd stock PEFT 16-bit",
)
FORMS = {SPLIT: "split", "mica fused": "fused", "mica fused, descriptors": "descriptor", ATEN: "aten"}


@contextmanager
def form_of(form: str | None) -> Iterator[None]:
    """Every call inside takes this form of `mica.kernel_path`, whatever was tuned."""
    with patch.object(kernel_path, "_choose", lambda *args: form):
        yield


@dataclass
class Rival:
    """``forward()`` gives y; ``inputs`` are what the backward differentiates by: x, and A unless bare."""

    name: str
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    form: str | None = None

    def gradients(self, y: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
        with form_of(self.form):
            return torch.autograd.grad(y, self.inputs, grad_output, retain_graph=True)

    def run(self) -> Tensor:
        with form_of(self.form):
            return self.forward()


def rivals(layer: Layer, compiled: bool = True) -> dict[str, Rival]:
    """All that run here, by name, the bare GEMM first."""
    x, lora_A = layer.x, layer.lora_A
    found = [Rival(BARE, lambda: F.linear(x, layer.weight), (x,))]

    def ours() -> Tensor:
        return mica_linear(x, layer.weight, lora_A, layer.lora_B, layer.scaling)

    for name, form in FORMS.items():
        if form != "descriptor" or descriptor_reason(layer) is None:
            found.append(Rival(name, ours, (x, lora_A), form))
    for name, adapter_dtype in ((STOCK, torch.float32), (STOCK_16, x.dtype)):
        module, stock_A = adapted_module(layer, adapter_dtype)
        found.append(Rival(name, lambda module=module: module(x), (x, stock_A)))
    if compiled:
        module, stock_A = adapted_module(layer, x.dtype)
        optimised = torch.compile(module)
        found.append(Rival(COMPILED, lambda: optimised(x), (x, stock_A)))
    return {rival.name: rival for rival in found}


def descriptor_reason(layer: Layer) -> str | None:
    return why_not_descriptor(layer.x, layer.weight.t(), target_of(layer.x.device))
