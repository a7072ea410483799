"""The matrices of an adapted parameter: one per expert (or half of one), each with its place in lora_B."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from mica.dtypes import FLOATING
from mica.errors import UnsuitableLayerError
from mica.fast.forward.expert_params import as_lora_B, is_stack, module_of, parameter_of, weight_of_stack
from mica.fast.settings import settings
from mica.subspace.gram import extremes
from mica.subspace.many import Task

GATE_UP = "gate_up_proj"


class Place(NamedTuple):
    """Where the basis of one matrix goes in a lora_B that is 0, as PEFT stores it for ``num_experts``."""

    num_experts: int
    expert: int
    rows: slice  # of the expert's out_features
    columns: slice  # of its rank

    def fill(self, lora_B: Tensor, basis: Tensor) -> None:
        """Write ``basis`` to lora_B (out_features, r·E), rounded to its dtype."""
        as_lora_B(lora_B, self.num_experts)[self.expert, self.rows, self.columns] = basis


class Part(NamedTuple):
    """What to solve, and where its basis goes; None: it is the whole B."""

    task: Task
    place: Place | None


def parts(layer: lora.LoraLayer, name: str, rank: int) -> list[Part]:
    """One per matrix to be solved; the weights are views of the parameter."""
    stack = weight_of_stack(layer).detach()
    of_experts = is_stack(layer)
    result = []
    for expert, weight in enumerate(stack):
        of_expert = f"{name} expert {expert}" if of_experts else name
        if is_halved(layer):
            for half, rows, columns in _halves(layer, rank):
                place = Place(len(stack), expert, rows, columns)
                result.append(Part(Task(f"{of_expert} ({half} half)", weight[rows], rank // 2), place))
        else:
            place = Place(len(stack), expert, slice(None), slice(None))
            result.append(Part(Task(of_expert, weight, rank), place))
    return result


def is_halved(layer) -> bool:
    """Whether gate and up get bases of their own: a stack of fused projections, and the setting."""
    return settings.gate_up == "halves" and is_stack(layer) and layer.parameter_name == GATE_UP


def _halves(layer, rank: int) -> tuple[tuple[str, slice, slice], ...]:
    """(name, rows, columns of B) of the gate and of the up projection, as the experts' class stores them."""
    half = layer.out_features // 2
    if getattr(module_of(layer), "is_concatenated", True):
        gate, up = slice(0, half), slice(half, None)
    else:
        gate, up = slice(0, None, 2), slice(1, None, 2)
    return ("gate", gate, slice(0, rank // 2)), ("up", up, slice(rank // 2, None))


def why_not_whole(module: nn.Module, weight) -> str | None:
    """Why the weight is only a part of it, as text that follows the layer's name; None if it is whole."""
    if getattr(module, "_is_expert_parallel", False):
        return "holds the experts of one process only (expert parallelism)"
    if hasattr(weight, "device_mesh") or getattr(module, "_hf_tp_plan", None) is not None:
        return "holds one shard of it (tensor parallelism or FSDP)"
    return None


def check(layer, name: str, rank: int) -> None:
    """What must hold before anything is solved, except that the weights are there.

    Raises:
        TypeError: the parameter is not of a floating dtype with 16 bits or more.
        ValueError: an odd rank where gate and up get half of it each.
        UnsuitableLayerError: MiCA cannot start from this parameter.
    """
    parameter = parameter_of(layer)
    if parameter.dtype not in FLOATING:
        raise TypeError(
            f"Please initialize MiCA under float32, float16, bfloat16 or float64: {name} has a weight of "
            f"dtype {parameter.dtype}. Experts in 8 or 4 bits (fp8, mxfp4) have to be dequantised when the "
            "model is loaded."
        )
    if _is_mislabelled(layer):
        raise UnsuitableLayerError(
            f"MiCA cannot start from {name}, because its experts are stored as (in_features, out_features) "
            f"and their {type(module_of(layer)).__name__} has no attribute `is_transposed`, so that PEFT "
            "takes in for out: set is_transposed = True on these modules before an adapter is created or "
            "loaded."
        )
    if is_stack(layer) and layer.num_experts == 1 and not layer._did_swap_in_out_features:
        raise UnsuitableLayerError(
            f"MiCA cannot start from {name}, a single expert of shape {tuple(parameter.shape)} stored as "
            "(1, in_features, out_features), because PEFT's update of such a parameter has the wrong shape."
        )
    _, out_features, in_features = weight_of_stack(layer).shape
    if is_halved(layer):
        if rank % 2:
            raise ValueError(
                f"gate_up='halves' gives gate and up half of the rank each, so r must be even, but it is "
                f"{rank} for {name}."
            )
        if out_features % 2:
            raise UnsuitableLayerError(
                f"gate_up='halves' needs a gate and an up half of one size, but {name} has {out_features} "
                "out_features."
            )
        if rank // 2 > min(out_features // 2, in_features):
            limit = 2 * min(out_features // 2, in_features)
            raise UnsuitableLayerError(
                f"MiCA requires `r` / 2 <= min(in_features, out_features / 2) for gate_up='halves' but got "
                f"r={rank} for {name} with weight shape {tuple(parameter.shape)} (max usable r is {limit})."
            )
    elif rank > min(out_features, in_features):
        raise UnsuitableLayerError(
            f"MiCA requires `r` <= min(in_features, out_features) but got r={rank} for {name} with weight "
            f"shape {tuple(parameter.shape)} (max usable r is {min(out_features, in_features)})."
        )


def _is_mislabelled(layer) -> bool:
    """Whether gate_up_proj and down_proj show that a module that says nothing stores them transposed.

    With hidden size H and intermediate size I they are (2I, H) and (H, I), transposed (H, 2I) and (I, H).
    """
    module = module_of(layer)
    stacks = [getattr(module, name, None) for name in (GATE_UP, "down_proj")]
    if hasattr(module, "is_transposed") or any(getattr(stack, "ndim", 0) != 3 for stack in stacks):
        return False
    gate_up, down = (stack.shape[1:] for stack in stacks)
    return gate_up == (down[1], 2 * down[0])


def check_finite(layer, name: str) -> None:
    """
    Raises:
        UnsuitableLayerError: NaN or Inf in the parameter; names the experts.
    """
    parameter = parameter_of(layer).detach()
    if torch.isfinite(extremes(parameter)).all():
        return
    stack = weight_of_stack(layer).detach()
    counts = [int((~torch.isfinite(weight)).sum()) for weight in stack]
    broken = [expert for expert, count in enumerate(counts) if count]
    where = f"expert{'s' if len(broken) > 1 else ''} {', '.join(map(str, broken[:5]))}"
    where += f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    where = f", in {where}" if is_stack(layer) else ""
    raise UnsuitableLayerError(
        f"MiCA requires finite weights, but {name} has {sum(counts)} NaN or Inf of {parameter.numel()}"
        f"{where}."
    )
