"""What the operators refuse because PyTorch would not: what is silently wrong, or reads foreign memory.

Kernels get addresses, and a tensor of another shape broadcasts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mica.dtypes import FLOATING
from mica.kernels import limits
from mica.ops.operator import is_autocast
from mica.paths.operands import Operands

# The dimensions of each tensor. Those of one name have one size; "..." are any number of leading ones.
_LINEAR = {
    "weight": "out_features in_features",
    "x": "... in_features",
    "lora_A": "rank in_features",
    "lora_B": "out_features rank",
    "bias": "out_features",
}
_EXPERTS = {
    "weight": "num_experts out_features in_features",
    "x": "rows in_features",
    "offsets": "num_experts",
    "lora_A": "num_experts rank in_features",
    "lora_B": "num_experts out_features rank",
    "bias": "num_experts out_features",
}
_DOWN_PROJECTION = {"lora_A": "rank in_features", "x": "... in_features"}
_UP_PROJECTION = {"lora_B": "out_features rank", "y": "... out_features", "h": "... rank"}
_EMBEDDING = {"indices": "...", "lora_A": "rank num_embeddings", "lora_B": "embedding_dim rank"}

_FROZEN = ("weight", "bias")
_INTEGERS = ("offsets", "indices")


def check_linear(x: Tensor, operands: Operands) -> None:
    _check_layer(_LINEAR, operands, x=x)


def check_experts_linear(x: Tensor, offsets: Tensor, operands: Operands) -> None:
    _check_layer(_EXPERTS, operands, x=x, offsets=offsets)


def check_down_projection(
    x: Tensor,
    lora_A: Tensor,
    compute_dtype: torch.dtype | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    _check_tensors(_DOWN_PROJECTION, seed=seed, x=x, lora_A=lora_A)
    _check_compute_dtype(compute_dtype)
    limits.dropout(dropout_p, seed)


def check_up_projection(y: Tensor, h: Tensor, lora_B: Tensor) -> None:
    _check_tensors(_UP_PROJECTION, y=y, h=h, lora_B=lora_B)


def check_embedding(
    indices: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    padding_idx: int | None,
    compute_dtype: torch.dtype | None,
) -> None:
    _check_tensors(_EMBEDDING, indices=indices, lora_A=lora_A, lora_B=lora_B)
    _check_frozen("lora_B", lora_B)
    _check_compute_dtype(compute_dtype)
    num_embeddings = lora_A.shape[1]
    if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx must be at least -{num_embeddings} and below {num_embeddings}, the number of "
            f"embeddings, but it is {padding_idx}."
        )


def _check_layer(dimensions: dict[str, str], operands: Operands, **rows: Tensor) -> None:
    weight, lora_A, lora_B, _, bias, compute_dtype, dropout_p, seed, *_ = operands
    _check_tensors(dimensions, **rows, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, seed=seed)
    x = rows["x"]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype and not is_autocast(x.device.type):
            differ = f"{name} is {tensor.dtype} and x {x.dtype}"
            raise TypeError(f"{name} must have the dtype of x outside autocast, but {differ}.")
    _check_compute_dtype(compute_dtype)
    limits.dropout(dropout_p, seed)


def _check_tensors(dimensions: dict[str, str], **tensors: Tensor | None) -> None:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    _check_shapes(dimensions, given)
    for name in given.keys() & dimensions.keys():
        _check_dtype(name, given[name].dtype)
    limits.same_device(**given)
    for name in _FROZEN:
        if name in given:
            _check_frozen(name, given[name])


def _check_frozen(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must be frozen (requires_grad=False), but it requires a gradient.")


def _check_shapes(dimensions: dict[str, str], tensors: dict[str, Tensor]) -> None:
    sizes = {}
    for tensor_name, names in dimensions.items():
        if tensor_name not in tensors:
            continue
        shape = tuple(tensors[tensor_name].shape)
        names = names.split()
        own = shape
        if names[0] == "...":
            leading = max(0, len(shape) - len(names) + 1)
            own = (shape[:leading], *shape[leading:])
        known = [name for name in names if name in sizes]
        fits = len(own) == len(names) and all(own[names.index(name)] == sizes[name] for name in known)
        if not fits:
            where = "".join(f", where {name} is {sizes[name]}" for name in known)
            raise ValueError(f"{tensor_name} must be ({', '.join(names)}){where}, but it is {shape}.")
        sizes |= dict(zip(names, own, strict=True))
        if sizes.get("rank") == 0:
            raise ValueError(f"the rank must be at least 1, but {tensor_name} is {shape}.")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    """The operators cast what they are given: an imaginary part, or a fraction, would be lost."""
    allowed = (torch.int32, torch.int64) if name in _INTEGERS else FLOATING
    if dtype not in allowed:
        raise TypeError(f"{name} must be of dtype {limits.names_of(allowed)}, but it is {dtype}.")


def _check_compute_dtype(compute_dtype: torch.dtype | None) -> None:
    if compute_dtype is not None and compute_dtype not in FLOATING:
        raise TypeError(f"compute_dtype must be a floating dtype, but it is {compute_dtype}.")
