"""One MiCA linear layer on a GPU and its rivals: the same operands, forward and backward, each as a closure.

Stock PEFT's layers are its plain LoRA with B frozen: MiCA's forward in PEFT is the same arithmetic, and its
initialisation (an SVD of every weight) is not what is timed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mica import kernel_path, reference
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


@dataclass
class Layer:
    """Operands of one layer: x (tokens×in), weight (out×in), fp32 masters of A and B, all of one scale."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    grad_output: Tensor

    @property
    def shape(self) -> str:
        return f"{self.x.shape[0]}x{self.weight.shape[0]}x{self.weight.shape[1]}"


def make_layer(tokens: int, out: int, inner: int, rank: int, dtype: torch.dtype, device: str) -> Layer:
    """Random operands in which the adapter's term is a tenth of the base's."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    return Layer(
        normal(tokens, inner).to(dtype).requires_grad_(),
        normal(out, inner, scale=inner**-0.5).to(dtype),
        normal(rank, inner, scale=inner**-0.5).requires_grad_(),
        normal(out, rank, scale=0.1 * rank**-0.5),
        1.0,
        normal(tokens, out).to(dtype),
    )


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
        module, stock_A = stock_module(layer, adapter_dtype)
        found.append(Rival(name, lambda module=module: module(x), (x, stock_A)))
    if compiled:
        module, stock_A = stock_module(layer, x.dtype)
        optimised = torch.compile(module)
        found.append(Rival(COMPILED, lambda: optimised(x), (x, stock_A)))
    return {rival.name: rival for rival in found}


def descriptor_reason(layer: Layer) -> str | None:
    return why_not_descriptor(layer.x, layer.weight.t(), target_of(layer.x.device))


def stock_module(layer: Layer, adapter_dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    out, inner = layer.weight.shape
    base = nn.Linear(inner, out, bias=False, device="meta")
    base.weight = nn.Parameter(layer.weight, requires_grad=False)
    rank = layer.lora_A.shape[0]
    config = LoraConfig(
        r=rank, lora_alpha=rank * layer.scaling, target_modules=["0"], init_lora_weights=False
    )
    adapted = get_peft_model(nn.Sequential(base), config)
    module = adapted.base_model.model[0].to(layer.x.device)
    for part, value in ((module.lora_A, layer.lora_A), (module.lora_B, layer.lora_B)):
        part["default"].weight = nn.Parameter(value.detach().to(adapter_dtype))
    module.lora_B["default"].weight.requires_grad_(False)
    return module, module.lora_A["default"].weight


def exact(layer: Layer) -> dict[str, Tensor]:
    """y, dx and dA in fp64 by the reference."""
    operands = [t.detach().double() for t in (layer.x, layer.weight, layer.lora_A, layer.lora_B)]
    y = reference.forward(*operands, layer.scaling)
    dx, dA = reference.linear_backward(layer.grad_output.double(), *operands, layer.scaling, torch.float64)
    return {"y": y, "dx": dx, "dA": dA}


def relative_errors(rival: Rival, layer: Layer, truth: dict[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of the difference over that of the truth, for y, dx and (where there is one) dA."""
    y = rival.run()
    values = dict(zip(("y", "dx", "dA"), (y, *rival.gradients(y, layer.grad_output)), strict=False))
    return {
        name: float((value.detach().double() - truth[name]).norm() / truth[name].norm())
        for name, value in values.items()
    }
