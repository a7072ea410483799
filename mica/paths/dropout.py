"""Which elements dropout keeps, from (seed, row, column) alone: the same on every device, in every language.

Nothing but the seed is stored for the backward, and gradient checkpointing, which restores torch's generator,
recomputes the same mask. The hash is written three times: here, in mica/native/loops.h and in
kernels/common.py; tests hold them against each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from mica import native
from mica.memory import TENSOR_TYPES

# Multipliers of the hash (hash prospector's) and of the column (2^32 over the golden ratio).
FIRST_FACTOR, SECOND_FACTOR, COLUMN_FACTOR = 0x21F0AAAD, 0xD35A2D97, 0x9E3779B9

# Elements whose int32 temporaries fit into a CPU's cache. A mask of 1024 x 2048 takes 7 ms with 2**16, 5 with
# 2**18 and 31 at once (one thread of an AMD EPYC); 1 in C++.
_BLOCK = 2**17


def drawn_seed(p: float, device: torch.device) -> Tensor | None:
    """A seed from torch's generator, whose state checkpointing restores, and so the mask.

    Args:
        p: The probability of dropout; where it is 0 nothing is drawn, and None returned.
        device: The device of the activations.
    """
    if p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), device=device)


def dropout_keep(seed: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """Which elements dropout keeps: bool (rows×columns), on the device of the seed.

    Each element is hashed from the two halves of the seed, its row and its column, modulo 2^32, and kept
    where the upper 24 bits of the hash are at least p·2^24.

    Args:
        seed: An int64 tensor of shape (1,).
        rows, columns: The shape of the mask.
        dropout_p: The probability p, in [0, 1), with which an element is dropped.
    """
    threshold = round(dropout_p * 2**24)
    step = max(1, _BLOCK // max(1, columns))
    if not _is_plain(seed) or rows <= step:
        return keep_rows(seed, 0, rows, columns, threshold)
    keep = torch.empty(rows, columns, dtype=torch.bool)
    for start in range(0, rows, step):
        block = keep[start : start + step]
        block.copy_(keep_rows(seed, start, len(block), columns, threshold))
    return keep


def _is_plain(seed: Tensor) -> bool:
    return type(seed) in TENSOR_TYPES and seed.is_cpu and not _are_functorch_transforms_active()


def keep_rows(seed: Tensor, first_row: int, rows: int, columns: int, threshold: int) -> Tensor:
    """`dropout_keep` of a block of rows, in int32, whose products wrap.

    Args:
        seed: An int64 tensor of shape (1,).
        first_row: The first row of the block.
        rows, columns: The shape of the block.
        threshold: p·2^24, rounded: hashes below it are dropped.
    """
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


def dropped(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """keep⊙x (M×K), a new tensor, with the mask of `dropout_keep`; not divided by 1 − p."""
    is_plain = _is_plain(seed) and type(x) in TENSOR_TYPES and not torch.compiler.is_compiling()
    module = native.module_if_built() if is_plain else None
    if module is not None:
        return module.masked(x, dropout_p, seed.item())
    return applied(dropout_keep(seed, *x.shape, dropout_p), x)


def applied(keep: Tensor | None, x: Tensor) -> Tensor:
    """keep⊙x (M×K), x where ``keep`` is None; the caller folds 1 / (1 − p) into something smaller."""
    return x if keep is None else x.where(keep, 0)
