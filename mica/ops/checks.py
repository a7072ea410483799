"""What the operators accept, and one sentence for what they refuse: argument, what it is, what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from mica.dtypes import FLOATING
from mica.kernels import limits
from mica.paths.operands import Operands

_INTEGER = (torch.int32, torch.int64)


def check_linear(x: Tensor, operands: Operands) -> None:
    weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed, _ = operands
    _check_dense(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B)
    _check_dense(**_given(bias=bias, seed=seed))
    _check_number("scaling", scaling)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be (..., in_features) and weight (out_features, in_features), but x is "
            f"{tuple(x.shape)} and weight {tuple(weight.shape)}."
        )
    _check_operands(x, operands, seed=seed)
    _check_compute(compute_dtype, dropout_p, seed)


def check_experts_linear(x: Tensor, offsets: Tensor, operands: Operands) -> None:
    weight, lora_A, lora_B, scaling, bias, compute_dtype, *_ = operands
    _check_dense(x=x, offsets=offsets, weight=weight, lora_A=lora_A, lora_B=lora_B)
    _check_dense(**_given(bias=bias))
    _check_number("scaling", scaling)
    if weight.dim() != 3 or x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            "x must be (rows, in_features) and weight (num_experts, out_features, in_features), but x is "
            f"{tuple(x.shape)} and weight {tuple(weight.shape)}."
        )
    if offsets.shape != weight.shape[:1]:
        raise ValueError(f"offsets must be ({weight.shape[0]},), but it is {tuple(offsets.shape)}.")
    _check_dtypes(_INTEGER, offsets=offsets)
    _check_operands(x, operands, offsets=offsets)
    _check_compute(compute_dtype, 0.0, None)


def _check_operands(x: Tensor, operands: Operands, **others: Tensor | None) -> None:
    """weight (..., out_features, in_features) with its adapter; leading dimensions: those of experts."""
    weight, lora_A, lora_B, _, bias, *_ = operands
    *experts, out_features, in_features = weight.shape
    rank = lora_A.shape[-2] if lora_A.dim() == weight.dim() else 0
    shapes = (*experts, rank, in_features), (*experts, out_features, rank)
    if (tuple(lora_A.shape), tuple(lora_B.shape)) != shapes:
        first = "num_experts, " if experts else ""
        raise ValueError(
            f"for a weight of shape {tuple(weight.shape)} lora_A must be ({first}rank, in_features) and "
            f"lora_B ({first}out_features, rank), but they are {tuple(lora_A.shape)} and "
            f"{tuple(lora_B.shape)}."
        )
    _check_rank("lora_A", lora_A, rank)
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:-1])}, but it is {tuple(bias.shape)}.")
    _check_dtypes(FLOATING, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    limits.same_device(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, **others)
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.dtype != x.dtype and not _is_autocast(x.device.type):
            raise TypeError(
                f"{name} must have the dtype of x outside autocast, but {name} is {tensor.dtype} and x "
                f"{x.dtype}."
            )
    _check_frozen(weight=weight, lora_B=lora_B, bias=bias)


def check_down_projection(
    x: Tensor,
    lora_A: Tensor,
    scaling: float,
    compute_dtype: torch.dtype | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    _check_dense(x=x, lora_A=lora_A)
    _check_dense(**_given(seed=seed))
    _check_number("scaling", scaling)
    if lora_A.dim() != 2 or x.dim() < 1 or x.shape[-1] != lora_A.shape[1]:
        raise ValueError(
            f"x must be (..., in_features) and lora_A (rank, in_features), but x is {tuple(x.shape)} and "
            f"lora_A {tuple(lora_A.shape)}."
        )
    _check_rank("lora_A", lora_A, lora_A.shape[0])
    _check_compute(compute_dtype, dropout_p, seed)
    _check_dtypes(FLOATING, x=x, lora_A=lora_A)
    limits.same_device(x=x, lora_A=lora_A, seed=seed)


def check_up_projection(y: Tensor, h: Tensor, lora_B: Tensor) -> None:
    _check_dense(y=y, h=h, lora_B=lora_B)
    fits = lora_B.dim() == 2 and y.dim() >= 1 and h.dim() >= 1 and y.shape[:-1] == h.shape[:-1]
    if not fits or (y.shape[-1], h.shape[-1]) != tuple(lora_B.shape):
        raise ValueError(
            "y must be (..., out_features), h (..., rank) and lora_B (out_features, rank), but they are "
            f"{tuple(y.shape)}, {tuple(h.shape)} and {tuple(lora_B.shape)}."
        )
    _check_rank("lora_B", lora_B, lora_B.shape[1])
    _check_dtypes(FLOATING, y=y, h=h, lora_B=lora_B)
    limits.same_device(y=y, h=h, lora_B=lora_B)
    _check_frozen(lora_B=lora_B)


def check_embedding(
    indices: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None,
    compute_dtype: torch.dtype | None,
) -> None:
    _check_dense(indices=indices, lora_A=lora_A, lora_B=lora_B)
    _check_number("scaling", scaling)
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            "lora_A must be (rank, num_embeddings) and lora_B (embedding_dim, rank), but they are "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    _check_rank("lora_A", lora_A, lora_A.shape[0])
    _check_dtypes(_INTEGER, indices=indices)
    _check_dtypes(FLOATING, lora_A=lora_A, lora_B=lora_B)
    limits.same_device(indices=indices, lora_A=lora_A, lora_B=lora_B)
    _check_frozen(lora_B=lora_B)
    _check_compute_dtype(compute_dtype)
    _check_padding_idx(padding_idx, lora_A.shape[1])


def _check_dense(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, but it is of type {type(tensor).__name__}.")
        if tensor.is_nested:
            raise TypeError(f"{name} must be a dense tensor, but it is a nested one.")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, but its layout is {tensor.layout}.")


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that are not None, which an optional one may be."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _check_number(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{name} must be a number, but it is {value!r} of type {type(value).__name__}.")


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


def _check_compute(compute_dtype: torch.dtype | None, dropout_p: float, seed: Tensor | None) -> None:
    _check_compute_dtype(compute_dtype)
    _check_number("dropout_p", dropout_p)
    limits.dropout(dropout_p, seed)


def _check_compute_dtype(compute_dtype: torch.dtype | None) -> None:
    if compute_dtype is not None and compute_dtype not in FLOATING:
        raise TypeError(f"compute_dtype must be a floating dtype, but it is {compute_dtype}.")


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _check_rank(name: str, factor: Tensor, rank: int) -> None:
    if rank == 0:
        raise ValueError(f"the rank must be at least 1, but {name} is {tuple(factor.shape)}.")


def _check_dtypes(allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise TypeError(f"{name} must be of dtype {limits.names_of(allowed)}, but it is {tensor.dtype}.")


def _check_frozen(**operands: Tensor | None) -> None:
    for name, tensor in operands.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must be frozen in MiCA (requires_grad=False), but it requires a gradient."
            )
