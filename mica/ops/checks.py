"""What the operators accept, and one sentence for what they refuse: argument, what it is, what is allowed."""

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

_OPTIONAL = ("bias", "seed")
_FROZEN = ("weight", "bias")
_INTEGERS = ("offsets", "indices")
_INTEGER = (torch.int32, torch.int64)


def check_linear(x: Tensor, operands: Operands) -> None:
    _check_layer(_LINEAR, operands, x=x)


def check_experts_linear(x: Tensor, offsets: Tensor, operands: Operands) -> None:
    _check_layer(_EXPERTS, operands, x=x, offsets=offsets)


def check_down_projection(
    x: Tensor,
    lora_A: Tensor,
    scaling: float,
    compute_dtype: torch.dtype | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    _check_tensors(_DOWN_PROJECTION, seed=seed, x=x, lora_A=lora_A)
    _check_numbers(scaling, compute_dtype, dropout_p, seed)


def check_up_projection(y: Tensor, h: Tensor, lora_B: Tensor) -> None:
    _check_tensors(_UP_PROJECTION, y=y, h=h, lora_B=lora_B)


def check_embedding(
    indices: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None,
    compute_dtype: torch.dtype | None,
) -> None:
    _check_tensors(_EMBEDDING, indices=indices, lora_A=lora_A, lora_B=lora_B)
    _check_frozen("lora_B", lora_B)
    _check_numbers(scaling, compute_dtype)
    _check_padding_idx(padding_idx, lora_A.shape[1])


def _check_layer(dimensions: dict[str, str], operands: Operands, **rows: Tensor) -> None:
    weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed, *_ = operands
    factors = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias, "seed": seed}
    _check_tensors(dimensions, **rows, **factors)
    x = rows["x"]
    for name in ("weight", "bias"):
        tensor = factors[name]
        if tensor is not None and tensor.dtype != x.dtype and not is_autocast(x.device.type):
            raise TypeError(
                f"{name} must have the dtype of x outside autocast, but {name} is {tensor.dtype} and x "
                f"{x.dtype}."
            )
    _check_numbers(scaling, compute_dtype, dropout_p, seed)


def _check_tensors(dimensions: dict[str, str], **tensors: Tensor | None) -> None:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None or name not in _OPTIONAL}
    for name, tensor in given.items():
        _check_dense(name, tensor)
    _check_shapes(dimensions, given)
    for name, tensor in given.items():
        if name in dimensions:
            _check_dtype(name, tensor.dtype)
    limits.same_device(**given)
    for name in _FROZEN:
        if name in given:
            _check_frozen(name, given[name])


def _check_frozen(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must be frozen (requires_grad=False), but it requires a gradient.")


def _check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, but it is of type {type(tensor).__name__}.")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, but it is a nested one.")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but its layout is {tensor.layout}.")


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
    allowed = _INTEGER if name in _INTEGERS else FLOATING
    if dtype not in allowed:
        raise TypeError(f"{name} must be of dtype {limits.names_of(allowed)}, but it is {dtype}.")


def _check_numbers(
    scaling: float, compute_dtype: torch.dtype | None, dropout_p: float = 0.0, seed: Tensor | None = None
) -> None:
    for name, value in (("scaling", scaling), ("dropout_p", dropout_p)):
        is_number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
        if isinstance(value, bool) or not is_number:
            kind = type(value).__name__
            raise TypeError(f"{name} must be a number, but it is {value!r} of type {kind}.")
    if compute_dtype is not None and compute_dtype not in FLOATING:
        raise TypeError(f"compute_dtype must be a floating dtype, but it is {compute_dtype}.")
    limits.dropout(dropout_p, seed)


def _check_padding_idx(padding_idx: int | None, num_embeddings: int) -> None:
    if padding_idx is None:
        return
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, (int, torch.SymInt)):
        kind = type(padding_idx).__name__
        raise TypeError(f"padding_idx must be an int or None, but it is {padding_idx!r} of type {kind}.")
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx must be at least -{num_embeddings} and below {num_embeddings}, the number of "
            f"embeddings, but it is {padding_idx}."
        )
