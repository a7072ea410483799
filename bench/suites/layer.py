"""One adapted linear layer: operands, its forms in PEFT, the controls in plain PyTorch, and what is exact.

The forward of MiCA is that of plain LoRA with B frozen. A and B are set, so that no initialisation (an SVD of
every weight) is run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.results.names import BACKWARD, BARE, MICA, NO_GRADIENT
from mica.fast.loading import without_solver
from tests.support import definition, models

OF_A_STEP = ("y", "dx", "dA", "dB")  # dB of plain LoRA only


@dataclass
class Layer:
    """Operands: x (tokens×in), weight (out×in), fp32 masters of A and B, all of the same scale.

    B requires a gradient in LoRA, in MiCA it does not.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    grad_output: Tensor

    @property
    def trained(self) -> list[Tensor]:
        """A, and B in LoRA."""
        return [factor for factor in (self.lora_A, self.lora_B) if factor.requires_grad]


class Form(NamedTuple):
    """An implementation. ``forward()`` gives y; ``inputs``: what the backward differentiates by, x first."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    context: Callable[[], AbstractContextManager] = nullcontext
    module: nn.Module | None = None

    def gradients(self, y: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.inputs, grad_output, retain_graph=True)

    def errors(self, grad_output: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
        """Frobenius norm of the difference over that of the truth, of y and any gradients (`OF_A_STEP`)."""
        values = [self.forward()]
        if torch.is_grad_enabled():
            values += self.gradients(values[0], grad_output)
        errors = {}
        for what, value in zip(OF_A_STEP, values, strict=False):
            exact = truth[what]
            errors[what] = float((value.detach().to(exact.dtype) - exact).norm() / exact.norm())
        return errors

    def call(self, part: str, grad_output: Tensor) -> Callable[[], object]:
        """What is timed as this pass; the forward of a backward runs now."""
        if part == BACKWARD:
            return partial(self.gradients, self.forward(), grad_output)
        return self.forward

    def time(self, once, part: str, grad_output: Tensor, axes: dict, calls: int, **facts) -> None:
        """One sample of this pass, by every clock."""
        with self.context(), torch.set_grad_enabled(part != NO_GRADIENT):
            once(self.call(part, grad_output), axes, calls, all_clocks=True, **facts)


def make_layer(
    tokens: int, out: int, inner: int, rank: int, dtype: torch.dtype, device: str, adapter: str = MICA
) -> Layer:
    """Random operands in which the adapter's term is a tenth of the base's."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    return Layer(
        x=normal(tokens, inner).to(dtype).requires_grad_(),
        weight=normal(out, inner, scale=inner**-0.5).to(dtype),
        lora_A=normal(rank, inner, scale=inner**-0.5).requires_grad_(),
        lora_B=normal(out, rank, scale=0.1 * rank**-0.5).requires_grad_(adapter != MICA),
        scaling=1.0,
        grad_output=normal(tokens, out).to(dtype),
    )


def adapted_module(
    layer: Layer, adapter_dtype: torch.dtype, dropout: float = 0.0
) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's layer over this weight, with these factors in ``adapter_dtype``; and what it trains, A first."""
    out, inner = layer.weight.shape
    base = nn.Linear(inner, out, bias=False, device="meta")
    base.weight = nn.Parameter(layer.weight, requires_grad=False)
    rank = layer.lora_A.shape[0]
    is_lora = layer.lora_B.requires_grad
    config = {"lora_alpha": rank * layer.scaling, "lora_dropout": dropout}
    init = True if is_lora else "mica"
    with without_solver():  # on a device its first run belongs to its own stage
        adapted = models.wrap(nn.Sequential(base), rank, ["0"], init_lora_weights=init, **config).train()
    module = adapted.base_model.model[0].to(layer.x.device)
    for part, value in ((module.lora_A, layer.lora_A), (module.lora_B, layer.lora_B)):
        part["default"].weight = nn.Parameter(value.detach().to(adapter_dtype), value.requires_grad)
    return module, [parameter for parameter in module.parameters() if parameter.requires_grad]


def exact(layer: Layer, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """y, dx, dA and dB in ``dtype`` by the reference."""
    operands = [t.detach().to(dtype) for t in (layer.x, layer.weight, layer.lora_A, layer.lora_B)]
    x, _, lora_A, lora_B = operands
    trained = [tensor.requires_grad_() for tensor in (x, lora_A, lora_B)]
    y = definition.linear(*operands, layer.scaling)
    gradients = torch.autograd.grad(y, trained, layer.grad_output.to(dtype))
    return dict(zip(OF_A_STEP, (y.detach(), *gradients), strict=True))


def check_dropout(errors: dict[str, float], p: float) -> None:
    """That dA is off by what dropout adds: its x has the relative variance p / (1 − p).

    Raises:
        AssertionError: it is not.
    """
    expected = (p / (1.0 - p)) ** 0.5
    assert abs(errors["dA"] / expected - 1) <= 0.5, f"dA is off by {errors['dA']:.2f}, not by {expected:.2f}"


def check_errors(name: str, errors: dict[str, float], limit: float) -> dict[str, float]:
    """The errors of an implementation as facts, once all are within the limit; the bare layer's say nothing.

    Raises:
        AssertionError: one of them is larger.
    """
    if name == BARE:
        limit = 1.0  # it lacks the adapter's term
    for what, error in errors.items():
        assert error <= limit, f"the relative error of {what} is {error:.2e}, above {limit:.0e}"
    if name == BARE:
        return {}
    return {f"error of {what}": float(f"{errors[what]:.3g}") for what in OF_A_STEP if what in errors}
