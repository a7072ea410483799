"""The matrices of an adapted parameter: one per expert (or half of one), each with its place in lora_B."""

from __future__ import annotations

from typing import NamedTuple

from peft.tuners import lora
from torch import Tensor

from mica.errors import UnsuitableLayerError
from mica.fast.forward.expert_params import as_lora_B, is_stack, parameter_of, weight_of_stack
from mica.fast.settings import settings
from mica.subspace.many import Task

GATE_UP = "gate_up_proj"


class SliceOfB(NamedTuple):
    """Where the basis of one matrix goes in a lora_B that is 0, as PEFT stores it for ``num_experts``."""

    num_experts: int
    expert: int
    rows: slice  # a part of the expert's out_features
    columns: slice  # a part of its rank

    def fill(self, lora_B: Tensor, basis: Tensor) -> None:
        """Write ``basis`` to lora_B (out_features, r·E), rounded to its dtype."""
        as_lora_B(lora_B, self.num_experts)[self.expert, self.rows, self.columns] = basis


class ExpertTask(NamedTuple):
    """What to solve, and where its basis goes; None: it is the whole B."""

    task: Task
    slice: SliceOfB | None


def tasks(layer: lora.LoraLayer, name: str, rank: int) -> list[ExpertTask]:
    """One per matrix to be solved; the weights are views of the parameter."""
    stack = weight_of_stack(layer).detach()
    if is_halved(layer):
        parts = _halves(layer, rank)
    else:
        parts = [("", slice(None), slice(None))]

    result = []
    for expert, weight in enumerate(stack):
        for part, rows, columns in parts:
            task_name = name
            if is_stack(layer):
                task_name = f"{name} expert {expert}{part}"
            task = Task(task_name, weight[rows], rank // len(parts))
            place = SliceOfB(len(stack), expert, rows, columns)
            result.append(ExpertTask(task, place))
    return result


def is_halved(layer) -> bool:
    """Whether gate and up get bases of their own: a stack of fused projections, and the setting."""
    return settings.gate_up == "halves" and is_stack(layer) and layer.parameter_name == GATE_UP


def _halves(layer, rank: int) -> tuple[tuple[str, slice, slice], ...]:
    """(name, rows, columns of B) of the gate and of the up projection, as the experts' class stores them."""
    if getattr(layer.get_base_layer(), "is_concatenated", True):
        half = layer.out_features // 2
        gate = slice(0, half)
        up = slice(half, None)
    else:  # row by row in turns
        gate = slice(0, None, 2)
        up = slice(1, None, 2)
    return (
        (" (gate half)", gate, slice(0, rank // 2)),
        (" (up half)", up, slice(rank // 2, None)),
    )


def check(layer, name: str, rank: int) -> None:
    """Refuse a parameter, or a rank, that MiCA cannot start from.

    Raises:
        ValueError: an odd rank where gate and up get half of it each.
        UnsuitableLayerError: MiCA cannot start from a parameter that is stored like this one.
    """
    if _is_mislabelled(layer):
        raise UnsuitableLayerError(
            f"MiCA cannot start from {name}, because its experts are stored as (in_features, out_features) "
            f"and their {type(layer.get_base_layer()).__name__} has no attribute `is_transposed`, so PEFT "
            "mistakes in_features for out_features: set is_transposed = True on these modules before an "
            "adapter is created or loaded."
        )
    if is_stack(layer) and layer.num_experts == 1 and not layer._did_swap_in_out_features:
        raise UnsuitableLayerError(
            f"MiCA cannot start from {name}, a single expert of shape {tuple(parameter_of(layer).shape)} "
            "stored as (1, in_features, out_features), because PEFT's update of such a parameter has the "
            "wrong shape."
        )
    if is_halved(layer) and rank % 2:
        raise ValueError(
            f"gate_up='halves' gives gate and up half of the rank each, so r must be even, but it is {rank} "
            f"for {name}."
        )
    if is_halved(layer) and layer.out_features % 2:
        raise UnsuitableLayerError(
            f"gate_up='halves' needs a gate and an up half of one size, but {name} has {layer.out_features} "
            "out_features."
        )


def _is_mislabelled(layer) -> bool:
    """Whether the shapes of gate_up_proj and down_proj show that a module stores them transposed, untold.

    With hidden size H and intermediate size I they are (2I, H) and (H, I), transposed (H, 2I) and (I, H).
    """
    module = layer.get_base_layer()
    gate_up = getattr(module, GATE_UP, None)
    down = getattr(module, "down_proj", None)
    if hasattr(module, "is_transposed"):
        return False
    if getattr(gate_up, "ndim", 0) != 3 or getattr(down, "ndim", 0) != 3:
        return False
    _, down_rows, down_columns = down.shape
    return gate_up.shape[1:] == (down_columns, 2 * down_rows)


def name_experts(experts: list[int], layer) -> str:
    """The end of a message, like ", in experts 1, 3"; nothing where the layer has none."""
    if not is_stack(layer):
        return ""
    noun = "experts" if len(experts) > 1 else "expert"
    named = f", in {noun} {', '.join(map(str, experts[:5]))}"
    if len(experts) > 5:
        named += f" and {len(experts) - 5} more"
    return named
