"""A number for the bits of each row of a matrix, as fast as memory is read: do two matrices differ?"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mica import native

# Size of the rows that are summed at a time. A copy of them that a CPU needs stays in its cache; on a device
# the number of launches matters.
_CHUNK_BYTES = 1 << 20
_DEVICE_CHUNK_BYTES = 1 << 26

# The integers with as many bytes.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_checksums(matrix: Tensor, word: torch.dtype | None = None) -> Tensor:
    """One int64 per row: the sum of its words, each times an odd number for its position, modulo 2^64.

    It finds accidents, not forgeries. A change of one word is always seen, since odd numbers have an inverse;
    so are words that moved, which a plain sum does not notice. A change of several words is missed with a
    probability of about 2^-63, but of 2^-31 where it is confined to the upper halves of words, and of 2^-15
    where it is confined to their upper quarters. Changes of nothing but the uppermost bits of an even number
    of words cancel.

    It depends on the bits alone, on no strides, offset or device. 0.1 ms for 1536 x 576 in bf16 on one core
    (the plain sum: 0.03).

    Args:
        matrix: (rows, columns), of any dtype and strides.
        word: the integer dtype of the words, of which each row has a whole number; None: the fastest one.
    """
    matrix = matrix.detach()
    word = word or _word_of(matrix)
    count = matrix.shape[1] * matrix.element_size() // word.itemsize
    odd = odd_numbers(count).to(matrix.device, non_blocking=True)

    parts = matrix.split(_rows_at_a_time(matrix))
    return torch.cat([_weighted_sums(_as_words(rows, word).to(torch.int64), odd) for rows in parts])


def _weighted_sums(words: Tensor, factors: Tensor) -> Tensor:
    """words @ factors, which PyTorch computes by one thread."""
    if not words.is_cpu:  # a device has no matrix product of integers
        return (words * factors).sum(dim=1)
    module = native.module_if_built()
    if module is None:
        return words @ factors  # twice as fast as a product and a sum
    return module.weighted_sums(words, factors)


@functools.lru_cache(maxsize=8)
def odd_numbers(count: int) -> Tensor:
    """The same ones at every call. Never written to."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device="cpu") | 1


def _word_of(matrix: Tensor) -> torch.dtype:
    """8 bytes where rows have whole ones, which is five times as fast for bf16 as its own 2.

    fp64 is read by halves: its signs are the uppermost bits of words of 8 bytes, so that a matrix and its
    negative would have the same sums.
    """
    if matrix.element_size() == 8:
        return torch.int32
    if matrix.shape[1] * matrix.element_size() % 8 == 0:
        return torch.int64
    return WORDS[matrix.element_size()]


def _rows_at_a_time(matrix: Tensor) -> int:
    size = _CHUNK_BYTES if matrix.is_cpu else _DEVICE_CHUNK_BYTES
    return max(1, size // max(1, matrix.shape[1] * matrix.element_size()))


def _as_words(rows: Tensor, word: torch.dtype) -> Tensor:
    """The words that hold the rows; a copy only where PyTorch has no view of them."""
    # Flat, because a view of other words looks at all strides, even that of a single row, which means nothing
    flat = rows.contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % word.itemsize:
        flat = flat.clone()
    return flat.view(word).view(len(rows), -1)
