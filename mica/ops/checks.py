"""What the operators accept, and one sentence for what they refuse: argument, what it is, what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from mica.dtypes import FLOATING
from mica.kernels import limits

_INTEGER = (torch.int32, torch.int64)


def check_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    compute_dtype: torch.dtype | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be (..., in_features) and weight (out_features, in_features), but x is "
            f"{tuple(x.shape)} and weight {tuple(weight.shape)}."
        )
    _check_adapter(weight, lora_A, lora_B)
    _check_compute(compute_dtype, dropout_p, seed)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), but it is {tuple(bias.shape)}.")
    _check_dtypes(FLOATING, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    limits.same_device(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, seed=seed)
    _check_same_dtype(x, weight=weight, bias=bias)
    _check_frozen(weight=weight, lora_B=lora_B, bias=bias)


def check_experts_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> None:
    if weight.dim() != 3 or x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            "x must be (rows, in_features) and weight (num_experts, out_features, in_features), but x is "
            f"{tuple(x.shape)} and weight {tuple(weight.shape)}."
        )
    num_experts, out_features, in_features = weight.shape
    rank = lora_A.shape[1] if lora_A.dim() == 3 else 0
    if (tuple(lora_A.shape), tuple(lora_B.shape)) != (
        (num_experts, rank, in_features),
        (num_experts, out_features, rank),
    ):
        raise ValueError(
            f"for a weight of shape {tuple(weight.shape)} lora_A must be (num_experts, rank, in_features) "
            "and lora_B (num_experts, out_features, rank), but they are "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    if rank == 0:
        raise ValueError(f"the rank must be at least 1, but lora_A is {tuple(lora_A.shape)}.")
    if offsets.shape != (num_experts,):
        raise ValueError(f"offsets must be ({num_experts},), but it is {tuple(offsets.shape)}.")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias must be {tuple(weight.shape[:2])}, but it is {tuple(bias.shape)}.")
    _check_compute(compute_dtype, 0.0, None)
    _check_dtypes(_INTEGER, offsets=offsets)
    _check_dtypes(FLOATING, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    limits.same_device(x=x, offsets=offsets, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    _check_same_dtype(x, weight=weight, bias=bias)
    _check_frozen(weight=weight, lora_B=lora_B, bias=bias)


def check_down_projection(
    x: Tensor, lora_A: Tensor, compute_dtype: torch.dtype | None, dropout_p: float, seed: Tensor | None
) -> None:
    if lora_A.dim() != 2 or x.dim() < 1 or x.shape[-1] != lora_A.shape[1]:
        raise ValueError(
            f"x must be (..., in_features) and lora_A (rank, in_features), but x is {tuple(x.shape)} and "
            f"lora_A {tuple(lora_A.shape)}."
        )
    _check_rank(lora_A)
    _check_compute(compute_dtype, dropout_p, seed)
    _check_dtypes(FLOATING, x=x, lora_A=lora_A)
    limits.same_device(x=x, lora_A=lora_A, seed=seed)


def check_up_projection(y: Tensor, h: Tensor, lora_B: Tensor) -> None:
    fits = lora_B.dim() == 2 and y.dim() >= 1 and y.shape[:-1] == h.shape[:-1]
    if not fits or (y.shape[-1], h.shape[-1]) != tuple(lora_B.shape):
        raise ValueError(
            "y must be (..., out_features), h (..., rank) and lora_B (out_features, rank), but they are "
            f"{tuple(y.shape)}, {tuple(h.shape)} and {tuple(lora_B.shape)}."
        )
    if lora_B.shape[1] == 0:
        raise ValueError(f"the rank must be at least 1, but lora_B is {tuple(lora_B.shape)}.")
    _check_dtypes(FLOATING, y=y, h=h, lora_B=lora_B)
    limits.same_device(y=y, h=h, lora_B=lora_B)
    _check_frozen(lora_B=lora_B)


def check_embedding(indices: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            "lora_A must be (rank, num_embeddings) and lora_B (embedding_dim, rank), but they are "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    _check_rank(lora_A)
    _check_dtypes(_INTEGER, indices=indices)
    _check_dtypes(FLOATING, lora_A=lora_A, lora_B=lora_B)
    limits.same_device(indices=indices, lora_A=lora_A, lora_B=lora_B)
    _check_frozen(lora_B=lora_B)


def _check_compute(compute_dtype: torch.dtype | None, dropout_p: float, seed: Tensor | None) -> None:
    if compute_dtype is not None and compute_dtype not in FLOATING:
        raise TypeError(f"compute_dtype must be a floating dtype, but it is {compute_dtype}.")
    limits.dropout(dropout_p, seed)


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _check_same_dtype(x: Tensor, **tensors: Tensor | None) -> None:
    if _is_autocast(x.device.type):
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} must have the dtype of x outside autocast, but {name} is {tensor.dtype} and x "
                f"{x.dtype}."
            )


def _check_adapter(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    rank = lora_A.shape[0] if lora_A.dim() else 0
    if lora_A.shape != (rank, weight.shape[1]) or lora_B.shape != (weight.shape[0], rank):
        raise ValueError(
            f"for a weight of shape {tuple(weight.shape)} lora_A must be (rank, in_features) and lora_B "
            f"(out_features, rank), but they are {tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    _check_rank(lora_A)


def _check_rank(lora_A: Tensor) -> None:
    if lora_A.shape[0] == 0:
        raise ValueError(f"the rank must be at least 1, but lora_A is {tuple(lora_A.shape)}.")


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
