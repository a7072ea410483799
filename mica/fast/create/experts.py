"""Adapted parameters that MiCA cannot start from."""

from __future__ import annotations

from mica.errors import UnsuitableLayerError
from mica.fast.forward.expert_params import is_stack, parameter_of


def check(layer, name: str) -> None:
    """Raise UnsuitableLayerError for a parameter that is stored in a way that MiCA cannot start from.

    Args:
        layer: PEFT's wrapper of the parameter.
        name: What messages call the parameter.
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


def _is_mislabelled(layer) -> bool:
    """Whether the shapes of gate_up_proj and down_proj show that a module stores them transposed, untold.

    With hidden size H and intermediate size I they are (2I, H) and (H, I), transposed (H, 2I) and (I, H).
    """
    module = layer.get_base_layer()
    gate_up = getattr(module, "gate_up_proj", None)
    down = getattr(module, "down_proj", None)
    if hasattr(module, "is_transposed"):
        return False
    if getattr(gate_up, "ndim", 0) != 3 or getattr(down, "ndim", 0) != 3:
        return False
    _, down_rows, down_columns = down.shape
    return gate_up.shape[1:] == (down_columns, 2 * down_rows)
