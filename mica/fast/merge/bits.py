"""Bits of weights: where two differ, and a fingerprint that notices an edit.

On a CPU NumPy compares: PyTorch takes six to eight times as long for `!=`, and three times for `nonzero`.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mica.fast.merge.scratch import converted, rows_at_a_time, scratch

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_AS_INTEGERS[tensor.element_size()])


def _mask(tensor: Tensor) -> Tensor:
    return scratch("mask", tensor.shape, torch.bool, tensor.device)


def positions_that_differ(left: Tensor, right: Tensor) -> Tensor:
    """Flat positions, int64, at which the bits of two contiguous tensors differ."""
    left = _bits(left)
    right = _bits(right)
    if left.device.type == "cpu":
        differ = _mask(left).numpy()
        np.not_equal(left.numpy(), right.numpy(), out=differ)
        return torch.from_numpy(np.flatnonzero(differ))
    return (left != right).flatten().nonzero().squeeze(1)


def count_equal(left: Tensor, right: Tensor) -> int:
    """How many values are equal, in a dtype that NumPy has: 0 is equal to -0, NaN to nothing."""
    if left.device.type == "cpu":
        equal = _mask(left).numpy()
        np.equal(left.numpy(), right.numpy(), out=equal)
        return int(np.count_nonzero(equal))
    return int((left == right).sum())


def fingerprint(weight: Tensor) -> Tensor:
    """One int64 per row: the sum of its 8-byte words, each times an odd number for its position, modulo 2^64.

    An edit of the weight between merge and unmerge must be noticed. A change of one word always is, since odd
    numbers have an inverse; so are words that moved, which a plain sum does not notice, unless they differ
    only in their uppermost bits. 0.1 ms for 1536 x 576 in bf16 on one core (the plain sum: 0.03).
    """
    weight = weight.detach()
    if weight.shape[1] * weight.element_size() % 8 == 0:
        words = weight.view(torch.int64)  # 8-byte words: five times as fast for bf16
    else:
        words = _bits(weight)
    odd = _odd_numbers(words.shape[1]).to(weight.device)

    sums = []
    for part in words.split(rows_at_a_time(weight)):
        part = converted(part, torch.int64, "words")
        # on a device integers have no matrix product; on the CPU it is five times as fast
        if weight.device.type == "cpu":
            sums.append(part @ odd)
        else:
            sums.append((part * odd).sum(dim=1))
    return torch.cat(sums)


@functools.lru_cache(maxsize=8)
def _odd_numbers(count: int) -> Tensor:
    """The same ones at every call. Never written to."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device="cpu") | 1
