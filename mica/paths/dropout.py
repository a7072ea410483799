"""Which elements dropout keeps, from (seed, row, column) alone: kernels and PyTorch draw the same mask.

Nothing but the seed is stored for the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_keep(seed: Tensor, rows: int, columns: int, dropout_p: float, first_row: int = 0) -> Tensor:
    """Which elements dropout keeps: bool (rows×columns), from ``first_row`` on, on the device of the seed.

    seed: int64 (1). Each element is hashed from the two halves of the seed, its row and its column, modulo
    2^32, and kept where the upper 24 bits of the hash are at least p·2^24. In int32, whose products wrap.
    """
    low, high = (_int32(half) for half in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    row = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=seed.device)
    column = torch.arange(columns, dtype=torch.int32, device=seed.device)
    first = _mix(row ^ low)
    second = _mix(first + high)
    z = column * _int32(0x9E3779B9) + first.unsqueeze(1)
    z = (z ^ _shift(z, 16)) * 0x21F0AAAD ^ second.unsqueeze(1)
    z = (z ^ _shift(z, 15)) * _int32(0xD35A2D97)
    return _shift(z ^ _shift(z, 15), 8) >= round(dropout_p * 2**24)


def _mix(z: Tensor) -> Tensor:
    """A bijection of 32 bits in which every input bit moves every output bit (hash prospector's)."""
    z = (z ^ _shift(z, 16)) * 0x21F0AAAD
    z = (z ^ _shift(z, 15)) * _int32(0xD35A2D97)
    return z ^ _shift(z, 15)


def _shift(z: Tensor, bits: int) -> Tensor:
    """The logical right shift of int32, whose own is arithmetic."""
    return (z >> bits) & (0xFFFFFFFF >> bits)


def _int32(value):
    """A number (or int64 numbers) of 32 bits as the int32 with the same bits."""
    signed = (value ^ 0x80000000) - 0x80000000
    return signed.to(torch.int32) if isinstance(signed, Tensor) else signed


def masked(x: Tensor, first_row: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """keep⊙x (M×K); the caller folds 1 / (1 − p) into something smaller."""
    if dropout_p == 0.0:
        return x
    return x.where(dropout_keep(seed, *x.shape, dropout_p, first_row), 0)
