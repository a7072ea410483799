"""Small parts of `twins`: what an action gave, how far two results are apart, an adapter's factors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import MiCALinearVariant
from torch import Tensor, nn

import mica.fast
from mica.fast.forward.eligibility import is_stored_transposed
from mica.fast.forward.expert_params import is_wrapper, lora_B_of, weight_of_stack
from tests.support import judging


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


def dtype_of_base(model: nn.Module) -> torch.dtype:
    return next(p for name, p in model.named_parameters() if is_base(name)).dtype


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


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Bit for bit, and of one dtype."""
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


def rounded_otherwise(model: nn.Module, autocast: torch.dtype | None) -> nn.Module:
    """The model with weights that are as good, within the rounding of their dtype, or of autocast's."""
    with torch.no_grad():
        for parameter in model.parameters():
            eps = max(torch.finfo(dtype).eps for dtype in (parameter.dtype, autocast) if dtype is not None)
            noise = torch.randn(parameter.shape, dtype=torch.float64) * (eps / 2)
            parameter.data = (parameter.data.double() * (1 + noise)).to(parameter.dtype)
    return model


def energy(out: torch.Tensor) -> torch.Tensor:
    return out.float().square().sum()


def furthest(results, exact) -> float:
    """The largest of the errors of all tensors in a result; gradients count together."""
    if isinstance(results, Tensor):
        return distance(results, exact)
    if isinstance(results, dict):
        flat, others = ([r.detach().double().flatten() for r in kept.values()] for kept in (results, exact))
        return distance(torch.cat(flat), torch.cat(others)) if flat else 0.0
    if isinstance(results, (tuple, list)):
        if len(results) != len(exact):
            return float("inf")
        return max((furthest(*pair) for pair in zip(results, exact, strict=True)), default=0.0)
    return 0.0


def judge(name: str, layer: LoraLayer, adapter: str) -> None:
    """Orthonormal, of the span of the weight's left singular vectors, and with the energy of the last ones.

    Not compared with stock's B: PEFT unmerges the model that it adds an adapter to, but its B is that of
    the merged weight, which may have less energy in the present one (outside of its span).
    Experts are judged one by one.
    """
    if is_wrapper(layer):
        weights, bases = weight_of_stack(layer).detach(), lora_B_of(layer, adapter).detach().double()
    else:
        weight = layer.get_base_layer().weight.detach()
        weights = [weight.t() if is_stored_transposed(layer) else weight]
        bases = [factors(layer, adapter)[1].detach().double()]
    for weight, basis in zip(weights, bases, strict=True):
        vectors, squares = judging.truth(weight)
        rank = basis.shape[1]
        assert (basis.T @ basis - torch.eye(rank, dtype=torch.float64)).abs().max() < 1e-5, name
        found, least = judging.energy(weight, basis).sum().sqrt(), squares[-rank:].sum().sqrt()
        is_least = found <= least * (1 + 1e-3) + 1e-5 * weight.norm()
        assert is_least, f"{name}: energy {found}, the least is {least}"
        assert judging.sine(vectors, basis) < 1e-4, f"{name}: B has directions that the weight has not"


def take_for_mica(adapter: str, stock: nn.Module, ours: nn.Module) -> None:
    """The twin's adapter, which is plain LoRA where stock refuses MiCA, is frozen where ours is."""
    config, mine = stock.peft_config[adapter], ours.peft_config[adapter]
    if not mine.target_parameters or mine.init_lora_weights != "mica":
        return
    config.init_lora_weights, config.peft_version = mine.init_lora_weights, mine.peft_version
    for layer, other in zip(layers(ours).values(), layers(stock).values(), strict=True):
        if adapter in layer.lora_variant and adapter not in other.lora_variant:
            other.lora_variant[adapter] = MiCALinearVariant()
            MiCALinearVariant.init(other, adapter)


def attributes(model: nn.Module) -> dict:
    values = {"active": list(model.active_adapters), "training": model.training}
    for name, config in model.peft_config.items():
        own = sorted(config.to_dict().items())
        values[f"config {name}"] = {k: str(sorted(v) if isinstance(v, set) else v) for k, v in own}
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


def check_experts(model: nn.Module, calls: dict[str, int], found: int, of_stacks: set[str], autocast) -> None:
    """Two products in each call of a module of experts that ``explain`` has on the fast path."""
    expected = 2 * sum(calls.get(name, 0) for name in of_stacks)
    only_a_call_shows = autocast or {p.dtype for p in model.parameters()} != {torch.float32}
    at_least = 0 if only_a_call_shows else expected
    assert at_least <= found <= expected, f"products of experts: {found}, by explain: {expected}"


def _multiplies_twice(layer: LoraLayer) -> bool:
    """Whether DoRA's base weight multiplies x, and what dropout leaves of it."""
    return layer.training and any(
        name in layer.lora_magnitude_vector and isinstance(layer.lora_dropout[name], nn.Dropout)
        for name in layer.active_adapters
    )


def check_counts(model: nn.Module, calls: dict[str, int], counted: dict[str, int], autocast) -> None:
    """The operators that ran are those that `explain` says: ``calls`` of each layer in the forward."""
    expected = dict.fromkeys(("linear", "embedding", "linear_added"), 0)
    rows = [row for row in mica.fast.explain(model).rows if row.path != "peft"]
    of_stacks = {row.name.rpartition(".")[0] for row in rows if row.name not in calls}
    products = sum(counted.get(name, 0) for name in ("experts_linear", "experts_base"))
    check_experts(model, calls, products, of_stacks, autocast)
    for row in rows:
        if row.name.rpartition(".")[0] in of_stacks:
            continue
        layer, count = model.get_submodule(row.name), calls.get(row.name, 0)
        adapters = sum(factors(layer, name) is not None for name in layer.active_adapters)
        if "Embedding" in type(layer).__name__:
            expected["embedding"] += count
            continue
        fused = "base layer called" not in row.reason
        if _multiplies_twice(layer):
            count *= 2
        expected["linear"] += count * adapters
        expected["linear_added"] += count * (adapters - fused)
    ran = {name: counted.get(name, 0) for name in expected}
    dtypes = {p.dtype for p in model.parameters()}
    told = f"operators that ran: {ran}, by explain: {expected}"
    if len(dtypes) > 1 or (
        autocast and torch.float64 in dtypes
    ):  # what only a call shows is not in the table
        assert all(ran[name] <= expected[name] + expected["linear"] for name in ran), told
    else:
        assert ran == expected, told
