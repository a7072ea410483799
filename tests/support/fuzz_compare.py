"""Small parts of `fuzz_twins`: what an action gave, how far two results are apart, an adapter's factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mica.fast.eligibility import is_stored_transposed
from tests.support.judging import energy, sine, truth


class Outcome(NamedTuple):
    value: Any = None
    error: Exception | None = None


def attempt(action: Callable, model: nn.Module) -> Outcome:
    try:
        return Outcome(action(model))
    except Exception as error:
        return Outcome(error=error)


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor] | None:
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return None


def is_base(name: str) -> bool:
    return "lora_" not in name and "modules_to_save" not in name


def distance(actual: Tensor, expected: Tensor, floor: float = 1e-6) -> float:
    """Relative Frobenius error; NaN and inf in the same places are equal, elsewhere infinitely far."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        return float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    difference = (actual - expected)[finite].norm().item()
    return difference / max(expected[finite].norm().item(), floor)


def rounded_otherwise(model: nn.Module) -> nn.Module:
    """The model with weights that are as good, within the rounding of their dtype."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * (torch.finfo(parameter.dtype).eps / 2)
            parameter.data = (parameter.data.double() * (1 + noise)).to(parameter.dtype)
    return model


def furthest(results, exact) -> float:
    """The largest of the errors of all tensors in a result; gradients count together."""
    if isinstance(results, Tensor):
        return distance(results, exact)
    if isinstance(results, dict):
        flat, others = ([r.detach().double().flatten() for r in kept.values()] for kept in (results, exact))
        return distance(torch.cat(flat), torch.cat(others)) if flat else 0.0
    if isinstance(results, (tuple, list)):
        return max((furthest(*pair) for pair in zip(results, exact, strict=True)), default=0.0)
    return 0.0


def has_cast_flags(layer: LoraLayer, adapter: str) -> bool:
    """Whether stock has made this anew, and so trainable."""
    half = layer.get_base_layer().weight.dtype in (torch.bfloat16, torch.float16)
    return half and adapter in layer.lora_embedding_A


def judge(name: str, layer: LoraLayer, adapter: str) -> None:
    """Orthonormal, of the span of the weight's left singular vectors, and with the energy of the last ones.

    Not compared with stock's B: PEFT unmerges the model that it adds an adapter to, but its B is that of
    the merged weight, which may have less energy in the present one (outside of its span).
    """
    weight, basis = layer.get_base_layer().weight.detach(), factors(layer, adapter)[1].detach().double()
    weight = weight.t() if is_stored_transposed(layer) else weight
    vectors, squares = truth(weight)
    rank = basis.shape[1]
    assert (basis.T @ basis - torch.eye(rank, dtype=torch.float64)).abs().max() < 1e-5, name
    found, least = energy(weight, basis).sum().sqrt(), squares[-rank:].sum().sqrt()
    assert found <= least * (1 + 1e-3) + 1e-5 * weight.norm(), f"{name}: energy {found}, the least is {least}"
    assert sine(vectors, basis) < 1e-4, f"{name}: B has directions that the weight has not"


def attributes(model: nn.Module) -> dict:
    values = {"active": list(model.active_adapters), "training": model.training}
    for name, config in model.peft_config.items():
        values[f"config {name}"] = {
            k: str(sorted(v) if isinstance(v, set) else v) for k, v in sorted(config.to_dict().items())
        }
    for name, layer in layers(model).items():
        values[name] = {
            "active": list(layer.active_adapters),
            "merged": list(layer.merged_adapters),
            "disabled": layer.disable_adapters,
            "training": layer.training,
            "scaling": {key: float(value) for key, value in layer.scaling.items()},
            "rank": dict(layer.r),
            "variants": {key: type(value).__name__ for key, value in layer.lora_variant.items()},
        }
    return values
