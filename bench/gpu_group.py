"""Three layers on one x (q/k/v) on a GPU: grouped, each alone, stock PEFT, and the bare products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_layer import STOCK_16, form_of
from bench.gpu_timing import interleaved, summary
from bench.layer import Layer, adapted_module, make_layer
from mica import reference
from mica.ops import mica_linear, mica_linear_group

BARE, ALONE, GROUPED = "three bare GEMMs", "mica, each alone", "mica, grouped"
COUNT = 3


def _layers(tokens: int, out: int, inner: int, rank: int, dtype: torch.dtype, device: str) -> list[Layer]:
    layers = [make_layer(tokens, out, inner, rank, dtype, device) for _ in range(COUNT)]
    for number, layer in enumerate(layers):  # of one seed: different, and still of one scale
        layer.x = layers[0].x
        layer.weight = layer.weight.roll(number, 0)
        layer.lora_A = layer.lora_A.detach().roll(number, 1).requires_grad_()
    return layers


def _forwards(layers: list[Layer]) -> dict[str, tuple]:
    """rival -> (forward() -> outputs, what the backward differentiates by)."""
    x, lora_As = layers[0].x, [layer.lora_A for layer in layers]
    stock = [adapted_module(layer, x.dtype) for layer in layers]
    lists = [[getattr(layer, name) for layer in layers] for name in ("weight", "lora_A", "lora_B", "scaling")]
    return {
        BARE: (lambda: [F.linear(x, layer.weight) for layer in layers], [x]),
        ALONE: (
            lambda: [mica_linear(x, one.weight, one.lora_A, one.lora_B, one.scaling) for one in layers],
            [x, *lora_As],
        ),
        GROUPED: (lambda: mica_linear_group(x, *lists), [x, *lora_As]),
        STOCK_16: (lambda: [module(x) for module, _ in stock], [x, *(lora_A for _, lora_A in stock)]),
    }


def _errors(layers: list[Layer], outputs: list[Tensor], gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """The largest over the layers, against fp64 by the reference."""
    found = {"y": 0.0, "dx": 0.0, "dA": 0.0}
    total = torch.zeros_like(layers[0].x, dtype=torch.float64)

    def relative(value: Tensor, truth: Tensor) -> float:
        return float((value.detach().double() - truth).norm() / truth.norm())

    for layer, y, grad_A in zip(layers, outputs, gradients[1:], strict=True):
        operands = [t.detach().double() for t in (layer.x, layer.weight, layer.lora_A, layer.lora_B)]
        found["y"] = max(found["y"], relative(y, reference.forward(*operands, layer.scaling)))
        dy = layer.grad_output.double()
        dx, dA = reference.linear_backward(dy, *operands, layer.scaling, torch.float64)
        found["dA"] = max(found["dA"], relative(grad_A, dA))
        total += dx
    found["dx"] = relative(gradients[0], total)
    return found


def measure_group(
    shape: tuple[int, int, int], rank: int, dtype: torch.dtype, device: str, rounds: int, gate: dict
) -> dict:
    """Errors, and if none is above the ``gate`` times with their extra over the bare products."""
    layers = _layers(*shape, rank, dtype, device)
    rivals = _forwards(layers)
    grads = [layer.grad_output for layer in layers]
    result = {"errors": {}, "wrong": [], "times": {}}

    def backward(outputs, inputs):
        return torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    with form_of("split"):
        outputs = {name: forward() for name, (forward, _) in rivals.items()}
        for name in (ALONE, GROUPED, STOCK_16):
            errors = _errors(layers, outputs[name], backward(outputs[name], rivals[name][1]))
            result["errors"][name] = errors
            if name == GROUPED:
                bad = {what: value for what, value in errors.items() if not value <= gate[what]}
                result["wrong"] = [f"{name}: error of {what} is {value:.2e}" for what, value in bad.items()]
        if result["wrong"]:
            return result
        timed = {
            "forward": interleaved({name: forward for name, (forward, _) in rivals.items()}, device, rounds),
            "backward": interleaved(
                {
                    name: lambda name=name, inputs=inputs: backward(outputs[name], inputs)
                    for name, (_, inputs) in rivals.items()
                },
                device,
                rounds,
            ),
        }
    timed["both"] = {
        name: [a + b for a, b in zip(timed["forward"][name], timed["backward"][name], strict=True)]
        for name in rivals
    }
    for name in rivals:
        result["times"][name] = {part: summary(times[name]) for part, times in timed.items()}
    for entry in result["times"].values():
        for part, times in entry.items():
            times["extra"] = times["us"] / result["times"][BARE][part]["us"] - 1
    return result
