"""Sums over a long side that several programs share: how they are split, and how their parts are added.

Every program writes its part, in fp32; the parts are added in the order 0, 1, 2, …, so reruns are bitwise
equal. What adds them depends on the target (`last_arriver_adds`). On NVIDIA the program that arrives last
does, in the same launch: for sm_80 and sm_90 the machine code is store, barrier, MEMBAR.ALL.GPU,
ATOMG.STRONG.GPU, CCTL.IVALL, barrier, strong loads. For gfx942 only the wave that makes the atomic waits for
its own stores (`s_waitcnt vmcnt(0)`); those of the program's other waves may still be on their way to the L2
cache, of which each of the eight dies has its own, and `.cg` becomes the hint `nt`. Until this form has been
tested on such a device a second launch adds the parts there: between two launches all writes become visible.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mica.kernels import configs
from mica.kernels.common import cast, ceil_div
from mica.kernels.launching import Plan

# Numbers per program of the second launch, four per thread on AMD: 128 bits of fp32.
_ADDED = configs.Config(1024, 0, 0, 4, 1)


# ---------------------------------------------------------------------------------------------------
# on the device
# ---------------------------------------------------------------------------------------------------


@triton.jit
def _sum_of_parts(partial_ptr, offsets, mask, num_splits, stride_split):
    total = tl.zeros(offsets.shape, tl.float32)
    for split in range(num_splits):
        part = partial_ptr + tl.cast(split, tl.int64) * stride_split + offsets
        total += tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")  # not from a stale L1
    return total


@triton.jit
def store_sum(
    acc, scale, out_ptr, offsets, mask, partial_ptr, counter_ptr, split, num_splits, stride_split,
    SPLIT: tl.constexpr, LAST_ADDS: tl.constexpr,
):  # fmt: skip
    """out = scale·acc, rounded once. If SPLIT, acc is one part of a sum that ``num_splits`` programs share.

    Each of them writes its part. If LAST_ADDS, the one that arrives last adds them all; the counter is an
    integer, and is left at 0 for the next launch. Else `add_parts` follows. The sum is formed here and not in
    the kernel that reads the result: there the parts spill registers for r ≥ 64.
    """
    if SPLIT:
        tl.store(partial_ptr + split.to(tl.int64) * stride_split + offsets, acc, mask=mask)
        if LAST_ADDS:
            tl.debug_barrier()  # all threads must have written before one of them counts
            last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_splits - 1
            if last:
                tl.store(counter_ptr, 0)
                total = _sum_of_parts(partial_ptr, offsets, mask, num_splits, stride_split)
                tl.store(out_ptr + offsets, cast(total * scale, out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + offsets, cast(acc * scale, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits"])
def _add_parts_kernel(
    partial_ptr,  # (splits, size) fp32, contiguous
    out_ptr,  # (size)
    size,
    num_splits,
    scale,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = _sum_of_parts(partial_ptr, offsets, mask, num_splits, size)
    tl.store(out_ptr + offsets, cast(total * scale, out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------
# on the host
# ---------------------------------------------------------------------------------------------------


def last_arriver_adds(target: str) -> bool:
    """Whether one launch is enough for a split sum on this target."""
    return target.startswith("sm_")


def add_parts(size: int, splits: int, scale: float, target: str) -> Plan | None:
    """The launch that adds the parts of a sum of ``size`` numbers; None where the first launch does it."""
    if splits == 1 or last_arriver_adds(target):
        return None
    numbers = {"size": size, "num_splits": splits, "scale": scale}
    grid = (ceil_div(size, _ADDED.block_m), 1)
    return Plan(_add_parts_kernel, grid, numbers, {"BLOCK": _ADDED.block_m}, _ADDED)


def split_evenly(length: int, block: int, tiles: int, columns: int, itemsize: int) -> tuple[int, int]:
    """(length of a split in whole blocks, number of splits), for a sum over ``length`` rows of x.

    Enough programs to fill a GPU, but at least two blocks each, and so few that writing and reading the fp32
    parts (8 bytes per split for each of ``columns``) moves at most a quarter of the bytes of x
    (``itemsize``). Where the tiles are at most a quarter of that many programs (up to 4224 tokens in tiles
    of 64), most multiprocessors would idle, and the parts stay in the L2 cache: there they may move as much
    as x does.

    For 512 tokens, 4096 features, bf16 that is (tiles, splits) = (32, 8) in `down_projection` at ranks 16 and
    64; in `grad_a` (128, 2) at rank 16 and (128, 1) at rank 64, whose parts would move as much as x.
    """
    is_small = 4 * tiles <= configs.PROGRAMS
    affordable = length * itemsize // ((8 if is_small else 32) * columns)
    splits = max(1, min(configs.PROGRAMS // max(1, tiles), ceil_div(length, 2 * block), affordable))
    per_split = ceil_div(ceil_div(length, splits), block) * block
    return per_split, ceil_div(length, per_split)
