"""One sentence for each argument that a kernel cannot take: what it is and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from mica.kernels.limits import DTYPES, MAX_RANK, names_of, padded_columns


def matrix(name: str, tensor: Tensor, dims: int = 2) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), but its shape is {tuple(tensor.shape)}.")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be of dtype {names_of(DTYPES)} for the kernels, but it is {tensor.dtype}."
        )


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must be {meaning} = {expected}, but its shape is {tuple(tensor.shape)}.")


def contracted(name: str, tensor: Tensor, dim: int, other_name: str, other: Tensor, other_dim: int) -> None:
    if tensor.shape[dim] != other.shape[other_dim]:
        raise ValueError(
            f"dimension {dim} of {name} and dimension {other_dim} of {other_name} must be equal, but their "
            f"shapes are {tuple(tensor.shape)} and {tuple(other.shape)}."
        )


def rank(name: str, value: int) -> None:
    if not 1 <= value <= MAX_RANK:
        raise ValueError(f"{name} must have a rank from 1 to {MAX_RANK} for the kernels, but it is {value}.")


def factor_rank(rank: int, factor: Tensor) -> None:
    if factor.shape[0] not in (rank, padded_columns(rank)):
        raise ValueError(
            f"factor must have rank = {rank} rows, or {padded_columns(rank)}, but its shape is "
            f"{tuple(factor.shape)}."
        )


def ranks_fit(h: Tensor, factor: Tensor) -> None:
    rank, rows = h.shape[1], factor.shape[0]
    if rank != rows and max(rank, rows) != padded_columns(min(rank, rows)):
        raise ValueError(
            "h must have as many columns as factor has rows, or one of the two that number rounded up to 16, "
            f"but their shapes are {tuple(h.shape)} and {tuple(factor.shape)}."
        )


def same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} and {other_name} must have one dtype, but they are {tensor.dtype} and {other.dtype}."
        )


def columns(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.shape[1] not in (rank, padded_columns(rank)):
        raise ValueError(
            f"{name} must have rank = {rank} columns, or {padded_columns(rank)}, but its shape is "
            f"{tuple(tensor.shape)}."
        )


def indices(tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64, but they are {tensor.dtype}.")
    if tensor.dim() != 1:
        raise ValueError(f"indices must be (num_tokens,), but their shape is {tuple(tensor.shape)}.")


def offsets(tensor: Tensor, name: str | None = None, stack: Tensor | None = None) -> None:
    """Ends of experts' rows. ``stack``: a tensor with one entry per expert, of this name."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, but they are {tensor.dtype}.")
    if tensor.dim() != 1 or not tensor.numel() or not tensor.is_contiguous():
        raise ValueError(
            "offsets must be (num_experts,), contiguous and not empty, but their shape is "
            f"{tuple(tensor.shape)} with strides {tensor.stride()}."
        )
    if stack is not None and tensor.shape[0] != stack.shape[0]:
        raise ValueError(
            f"offsets and {name} must have one entry per expert, but their shapes are {tuple(tensor.shape)} "
            f"and {tuple(stack.shape)}."
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise TypeError(f"compute_dtype must be {names_of(DTYPES)} for the kernels, but it is {dtype}.")
    return dtype
