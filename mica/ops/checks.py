"""What the operators refuse because PyTorch would not: what is silently wrong, or reads foreign memory.

Kernels get addresses, a tensor of another shape broadcasts, and the operators cast what they are given: an
imaginary part, or a fraction, would be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mica.dtypes import FLOATING
from mica.kernels import limits
from mica.ops.operator import is_autocast

# The dimensions of each operand. Those of one name have one size; "..." are any number of leading ones.
LINEAR = {
    "weight": "out_features in_features",
    "x": "... in_features",
    "lora_A": "rank in_features",
    "lora_B": "out_features rank",
    "bias": "out_features",
}
EXPERTS = {
    "weight": "num_experts out_features in_features",
    "x": "rows in_features",
    "offsets": "num_experts",
    "lora_A": "num_experts rank in_features",
    "lora_B": "num_experts out_features rank",
    "bias": "num_experts out_features",
}


def check_operands(
    dimensions: dict[str, str],
    *,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    **operands,
) -> None:
    """Raise an error that names the operand, unless an operator can compute with what it has been given.

    Args:
        dimensions: one of the tables above, for the operator.
        compute_dtype, dropout_p, seed: as the operators take them.
        operands: by their names in the table; those that are not in it are not looked at.

    Raises:
        TypeError: an operand, or the compute_dtype, is not of a dtype that the operator computes with, or the
            weight or bias is not of the dtype of x outside autocast.
        ValueError: a shape, a device or dropout_p does not fit, or a frozen operand requires a gradient.
    """
    given = {name: operands[name] for name in dimensions if operands.get(name) is not None}
    sizes: dict[str, object] = {}
    for name, tensor in given.items():
        _check_shape(name, tuple(tensor.shape), dimensions[name].split(), sizes)
        allowed = (torch.int32, torch.int64) if name == "offsets" else FLOATING
        if tensor.dtype not in allowed:
            raise TypeError(f"{name} must be of dtype {limits.names_of(allowed)}, but it is {tensor.dtype}.")
        if name in ("weight", "bias") and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must be frozen (requires_grad=False), but it requires a gradient.")
    limits.same_device(**given, seed=seed)
    dtype_of_x = given["x"].dtype
    for name in ("weight", "bias"):
        if name not in given or is_autocast(given[name].device.type):
            continue
        dtype = given[name].dtype
        if dtype != dtype_of_x:
            differ = f"{name} is {dtype} and x {dtype_of_x}"
            raise TypeError(f"{name} must have the dtype of x outside autocast, but {differ}.")
    if compute_dtype is not None and compute_dtype not in FLOATING:
        raise TypeError(f"compute_dtype must be a floating dtype, but it is {compute_dtype}.")
    limits.dropout(dropout_p, seed)


def _check_shape(tensor: str, shape: tuple, names: list[str], sizes: dict[str, object]) -> None:
    """Compare with the sizes that are known, and add the new ones."""
    own = shape
    if names[0] == "...":
        leading = max(0, len(shape) - len(names) + 1)
        own = (shape[:leading], *shape[leading:])
    known = "".join(f", where {name} is {sizes[name]}" for name in names if name in sizes)
    fits = len(own) == len(names)
    for name, size in zip(names, own, strict=False):
        fits = sizes.setdefault(name, size) == size and fits
    if not fits:
        raise ValueError(f"{tensor} must be ({', '.join(names)}){known}, but it is {shape}.")
