"""Which rows of x a program has where x's rows are sorted by expert, without asking the host.

The ends of the experts' rows are on the device, and reading them would make the host wait. Instead, as many
programs are launched as there can be tiles, and each finds its own. Expert e has the program numbers from
start // BLOCK_M + e to end // BLOCK_M + e (both included), which are at least as many as it has tiles; the
next expert's begin after them. To find its expert, a program counts ends: no sum over the experts before it
is needed, and no map in memory. At most num_experts programs have no rows, and end at once.

Without experts (BLOCK_E = 0) a dense matrix is one expert that has all the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mica.kernels.common import ceil_div, power_of_two


@triton.jit
def tile_of(offsets_ptr, tile, num_rows, num_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile; no rows are left where first ≥ end.

    The rows after the last expert's have the number num_experts.
    """
    if BLOCK_E == 0:
        return 0, tile * BLOCK_M, num_rows
    else:
        experts = tl.arange(0, BLOCK_E)
        is_expert = experts < num_experts
        ends = tl.load(offsets_ptr + experts, mask=is_expert, other=0).to(tl.int32)
        is_before = is_expert & (ends // BLOCK_M + experts < tile)
        expert = tl.sum(is_before.to(tl.int32), axis=0)
        start, end = rows_of(offsets_ptr, expert, num_rows, num_experts)
        return expert, start + (tile - start // BLOCK_M - expert) * BLOCK_M, end


@triton.jit
def rows_of(offsets_ptr, expert, num_rows, num_experts):
    """(first row, end) of an expert, or of the rows after the last one's."""
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + expert, mask=expert < num_experts, other=num_rows).to(tl.int32)
    return start, end


def most_tiles(num_rows: int, num_experts: int, block_m: int, tail: bool = False) -> int:
    """How many program numbers there are; ``tail``: also for the rows after the last expert's."""
    if not num_experts:
        return ceil_div(num_rows, block_m)
    if not num_rows:
        return 0
    return num_rows // block_m + num_experts + tail


def block_e(num_experts: int) -> int:
    """The number of ends that a program loads: a power of two, at least 16; 0 without experts."""
    return max(16, power_of_two(num_experts)) if num_experts else 0
