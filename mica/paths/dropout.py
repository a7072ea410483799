"""Which elements dropout keeps, from (seed, row, column) alone: the same on every device, in every language.

Nothing but the seed is stored for the backward, and gradient checkpointing, which restores torch's generator,
recomputes the same mask. The hash is written four times: here as PyTorch's operators and for NumPy, in
mica/native/loops.h and in kernels/common.py; tests hold them against each other.

Time of a mask of 1024 x 2048 on one thread of a CPU: 44 ms by PyTorch's operators, whose int32 temporaries do
not fit into the cache, 6 by NumPy in blocks that do, 1 in C++. PyTorch's own ``bernoulli_`` takes 15.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

# Multipliers of the hash (hash prospector's) and of the column (2^32 over the golden ratio).
FIRST_FACTOR, SECOND_FACTOR, COLUMN_FACTOR = 0x21F0AAAD, 0xD35A2D97, 0x9E3779B9

_BLOCK = 2**15  # elements; 1024 x 2048 takes 6 ms with 2**14 to 2**16, 13 with 2**18


def dropout_keep(seed: Tensor, rows: int, columns: int, dropout_p: float, first_row: int = 0) -> Tensor:
    """Which elements dropout keeps: bool (rows×columns), from ``first_row`` on, on the device of the seed.

    seed: int64 (1). Each element is hashed from the two halves of the seed, its row and its column, modulo
    2^32, and kept where the upper 24 bits of the hash are at least p·2^24.
    """
    threshold = round(dropout_p * 2**24)
    is_readable = type(seed) in (Tensor, torch.nn.Parameter) and seed.device.type == "cpu"
    if is_readable and not _are_functorch_transforms_active():
        return torch.from_numpy(keep_by_numpy(int(seed), rows, columns, threshold, first_row))
    return keep_by_torch(seed, rows, columns, threshold, first_row)


def keep_by_torch(seed: Tensor, rows: int, columns: int, threshold: int, first_row: int) -> Tensor:
    """In int32, whose products wrap."""
    low, high = (_int32(half) for half in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    row = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=seed.device)
    column = torch.arange(columns, dtype=torch.int32, device=seed.device)
    first = _mix(row ^ low)
    second = _mix(first + high)
    z = _mix(column * _int32(COLUMN_FACTOR) + first.unsqueeze(1), second.unsqueeze(1))
    return _shift(z, 8) >= threshold


def _mix(z: Tensor, between: Tensor | int = 0) -> Tensor:
    """A bijection of 32 bits in which every input bit moves every output bit.

    between: mixed in between its two steps.
    """
    z = (z ^ _shift(z, 16)) * FIRST_FACTOR ^ between
    z = (z ^ _shift(z, 15)) * _int32(SECOND_FACTOR)
    return z ^ _shift(z, 15)


def _shift(z: Tensor, bits: int) -> Tensor:
    """The logical right shift of int32, whose own is arithmetic."""
    return (z >> bits) & (0xFFFFFFFF >> bits)


def _int32(value):
    """A number (or int64 numbers) of 32 bits as the int32 with the same bits."""
    signed = (value ^ 0x80000000) - 0x80000000
    return signed.to(torch.int32) if isinstance(signed, Tensor) else signed


def keep_by_numpy(seed: int, rows: int, columns: int, threshold: int, first_row: int) -> np.ndarray:
    low = np.uint32(seed & 0xFFFFFFFF)
    high = np.uint32((seed >> 32) & 0xFFFFFFFF)
    row = np.arange(first_row, first_row + rows).astype(np.uint32)
    first = row ^ low
    _mix_in_place(first, np.empty_like(first))
    second = first + high
    _mix_in_place(second, np.empty_like(second))
    column = np.arange(columns, dtype=np.uint32) * np.uint32(COLUMN_FACTOR)

    keep = np.empty((rows, columns), dtype=bool)
    step = max(1, _BLOCK // max(1, columns))
    z = np.empty((min(step, rows), columns), dtype=np.uint32)
    scratch = np.empty_like(z)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        count = block.stop - start
        of_block, scratch_of_block = z[:count], scratch[:count]
        np.add(column, first[block, None], out=of_block)
        _mix_in_place(of_block, scratch_of_block, second[block, None])
        of_block >>= np.uint32(8)
        np.greater_equal(of_block, np.uint32(threshold), out=keep[block])
    return keep


def _mix_in_place(z: np.ndarray, scratch: np.ndarray, between: np.ndarray | None = None) -> None:
    """`_mix`."""
    np.right_shift(z, np.uint32(16), out=scratch)
    z ^= scratch
    z *= np.uint32(FIRST_FACTOR)
    if between is not None:
        z ^= between
    np.right_shift(z, np.uint32(15), out=scratch)
    z ^= scratch
    z *= np.uint32(SECOND_FACTOR)
    np.right_shift(z, np.uint32(15), out=scratch)
    z ^= scratch


def applied(keep: Tensor | None, x: Tensor) -> Tensor:
    """keep⊙x (M×K), x where ``keep`` is None; the caller folds 1 / (1 − p) into something smaller."""
    return x if keep is None else x.where(keep, 0)
