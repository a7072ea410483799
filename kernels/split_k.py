"""Sums over a long side that several programs share: how they are split, and how their parts are added.

Every program writes its part, in fp32, and the one that arrives last adds them in the order 0, 1, 2, …, so
that reruns are bitwise equal. For sm_80 and sm_90 the machine code is store, barrier, MEMBAR.ALL.GPU,
ATOMG.STRONG.GPU, CCTL.IVALL, barrier, strong loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mica.kernels import configs
from mica.kernels.common import cast, ceil_div

# ---------------------------------------------------------------------------------------------------
# on the device
# ---------------------------------------------------------------------------------------------------


@triton.jit
def store_sum(
    acc, scale, out_ptr, offsets, mask, partial_ptr, counter_ptr, tile, split, num_splits, stride_split
):
    """out = scale·acc, rounded once. With ``partial_ptr``, acc is a part of a sum of ``num_splits`` programs.

    Each of them writes its part, and the one that arrives last adds them all. There is one counter per tile,
    an integer, which is left at 0 for the next launch. The sum is formed here and not in the kernel that
    reads the result, where the parts would spill registers for r ≥ 64.
    """
    if partial_ptr is not None:
        tl.store(partial_ptr + split.to(tl.int64) * stride_split + offsets, acc, mask=mask)
        tl.debug_barrier()  # all threads must have written before one of them counts
        last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == num_splits - 1
        if last:
            tl.store(counter_ptr + tile, 0)
            total = tl.zeros(offsets.shape, tl.float32)
            for part in range(num_splits):
                part_ptrs = partial_ptr + tl.cast(part, tl.int64) * stride_split + offsets
                total += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")  # not from a stale L1
            tl.store(out_ptr + offsets, cast(total * scale, out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + offsets, cast(acc * scale, out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------
# on the host
# ---------------------------------------------------------------------------------------------------


def split_evenly(length: int, block: int, tiles: int, columns: int, itemsize: int) -> tuple[int, int]:
    """(length of a split in whole blocks, number of splits), for a sum over ``length`` rows of x.

    There are enough programs to fill a GPU, but each has at least two blocks, and they are so few that
    writing and reading the fp32 parts (8 bytes per split for each of ``columns``) moves at most a quarter of
    the bytes of x (``itemsize`` each). Where the tiles are at most a quarter of that many programs (up to
    4224 tokens in tiles of 64), most multiprocessors would idle, and the parts stay in the L2 cache: there
    they may move as much as x does.

    For 512 tokens, 4096 features, bf16, (tiles, splits) is (32, 8) in `down_projection` at ranks 16 and 64;
    in `grad_a` it is (128, 2) at rank 16, and (128, 1) at rank 64, whose parts would move as much as x.
    """
    is_small = 4 * tiles <= configs.PROGRAMS
    bytes_per_column = 8 if is_small else 32
    affordable = length * itemsize // (bytes_per_column * columns)
    fitting = configs.PROGRAMS // max(1, tiles)
    filled = ceil_div(length, 2 * block)
    splits = max(1, min(fitting, filled, affordable))
    per_split = ceil_div(ceil_div(length, splits), block) * block
    return per_split, ceil_div(length, per_split)
