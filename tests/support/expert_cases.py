"""Routes, stacks of factors and sums expert by expert, for the tests of stacks of experts."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch

from tests.support.guarding import guarded
from tests.support.kernel_cases import DEVICE
from tests.support.oracle import guard

# number of rows, ends: without rows at the start, in the middle and at the end, all rows to one expert, rows
# that belong to none, one row each, more than one tile of 64, and more than one of rows that belong to none
ROUTES = {
    "first and last idle": (12, [0, 3, 3, 9, 12, 12]),
    "one expert": (7, [7]),
    "all to the second": (20, [0, 20, 20]),
    "rows of none": (15, [4, 4, 10]),
    "none at all": (5, [0, 0]),
    "one each": (4, [1, 2, 3, 4]),
    "tiles": (261, [70, 70, 71, 199]),
}


def offsets_of(ends: list[int], dtype=torch.int32) -> torch.Tensor:
    return guarded(torch.tensor(ends, dtype=dtype), DEVICE)


def slices(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def idle(ends: list[int]) -> list[int]:
    """The experts without rows."""
    return [expert for expert, rows in enumerate(slices(ends)) if rows.start == rows.stop]


def stack(experts, rows, columns, dtype, layout="contiguous", scale=1.0):
    """Random matrices on the tested device.

    layout: "contiguous"; "gaps", rows apart in a buffer of NaN; "peft", as PEFT stores B: (rows, columns,
    experts) in memory.
    """
    matrices = (torch.randn(experts, rows, columns) * scale).to(dtype)
    if layout == "gaps":
        buffer = torch.full((experts, rows, columns + 3), guard(dtype), dtype=dtype)
        buffer[..., 1:-2] = matrices
        matrices = buffer[..., 1:-2]
    elif layout == "peft":
        matrices = matrices.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return guarded(matrices, DEVICE)


def by_expert(left, ends, stacked):
    """left_e stacked_e in fp64, (num_rows, columns); rows of no expert are 0."""
    out = left.new_zeros(left.shape[0], stacked.shape[2], dtype=torch.float64)
    rank = min(left.shape[1], stacked.shape[1])  # either may be padded
    for expert, rows in enumerate(slices(ends)):
        out[rows] = left[rows, :rank].double() @ stacked[expert, :rank].double()
    return out


def route(counts: list[int], leftover: int) -> tuple[int, list[int]]:
    """(number of rows, ends)."""
    ends = list(accumulate(counts))
    return ends[-1] + leftover, ends
