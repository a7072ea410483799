"""Launch configurations: at most three per kernel and target, chosen by shape, the first one by default.

`make static` compiles them ahead of time: all for sm_80, sm_90 and sm_100, the first ones for the other
targets. They follow from the bytes and operations of each product and from what compiles without spills, not
from timings. The block size along the rank is `padded_rank`, not part of a configuration. `FORM_NAMES` are
the ways in which kernels make up a layer.

A new configuration is an entry in a table: `make static` compiles it, `make emulate ARGS=--all` runs it. One
that is no shape's default is passed over by `make static ARGS=--quick` and by `make emulate` without
``--all``. In the table of a skinny product it goes between the two defaults, because few tokens read that
table backwards. To run it alone:
``python -m tests.emulator --all --target sm_80 --only "rank=16 config=Config(block_m=64"``.

The output of `make static` is kept in bench/results/static, and its lines for sm_90 in kernels/README.md; no
test notices when they are out of date.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# Shared memory per program in bytes: the limit per block less what the driver reserves.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    # only compiled: ROCm takes the reference path
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
# Of an NVIDIA device that is not listed: the least that one has since sm_80.
UNLISTED_SHARED_MEMORY = 99 * 1024
# Programs that keep every multiprocessor of a large GPU busy (an H100 has 132). A constant instead of the
# device's own number, so that splits, and with them results, depend on shapes only.
PROGRAMS = 264
MANY_TOKENS = 8192  # more than any threshold below
# How `mica.paths.triton_path` runs a layer's forward, or its backward:
#
# split      the skinny product, then the base product by the vendor's library, then an update in place
# first      the skinny product, then the low-rank term alone, to which the vendor's base product is added
#            (its beta is 1): y is not read again, and rounded while it is small; 16 bits, no dropout
# mixed      as split, with the skinny products and dA by the vendor's library too: 16 bits, no dropout
# fused      base product and update in one kernel
# reference  none of these kernels: the reference path
#
# Each device measures which is the fastest there (`mica.paths.tuning`).
FORM_NAMES = ("split", "first", "mixed", "fused", "reference")
TALL_TOKENS = 4096  # with fewer, tall tiles fill the GPU only if the sum is split into many parts
# Targets whose tensor cores read both operands from shared memory and multiply for four warps at once, which
# leaves registers for larger tiles.
_HOPPER_ON = ("sm_90", "sm_100")
# Ranks (as padded) at which the tile of 128 tokens of `down_projection` is tried.
_TALL_RANKS = {"sm_90": (32, 64, 128), "sm_100": (32, 64)}


class Config(NamedTuple):
    """Tile sizes (along tokens, out_features and the contracted side), warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def rank_at_a_time(itemsize: int) -> int:
    """How much of the rank one step of a wide product takes: 128 bytes. With more, fp32 operands spill."""
    return 128 // itemsize


def _fits(config: Config, bytes_per_stage: int, target: str) -> Config:
    """The configuration with as many stages as 90 % of the target's shared memory holds, at least one."""
    shared_memory = SHARED_MEMORY.get(target, UNLISTED_SHARED_MEMORY)
    limit = shared_memory * 9 // 10
    num_stages = max(1, min(config.num_stages, limit // bytes_per_stage))
    return config._replace(num_stages=num_stages)


# The tables are pure functions of their arguments, so that cached results cannot become wrong. In all of them
# ``block_r`` is the rank as padded, and ``itemsize`` the bytes of one number in the product.


@functools.lru_cache(maxsize=1024)
def down_projection(target: str, num_tokens: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """For h = x Pᵀ, with a thin K tile for wide ranks.

    With wide ranks small tiles of tokens come first up to more tokens, because each part of a split costs as
    much as h does. With many tokens, tall tiles read P half as often through the L2 cache: 34 MB at rank 64,
    next to 67 MB of x (8192 x 4096). On sm_90 they take 54, 80 and 128 registers at ranks 32, 64 and 128, so
    that three, three and two programs run at once; on sm_100 they take 134 at rank 128, enough for one. At
    rank 256 they spill.
    """
    block_k = max(32, 256 // itemsize * 16 // max(16, block_r // 2))
    if block_r == 32:  # with 128 an fp32 P takes 120 KB of shared memory: one program, for 1.9 waves
        block_k = 64

    if block_r * itemsize >= 1024:  # fp32 at rank 256: three TF32 products spill with larger tiles
        wide = Config(32, 0, block_k, 8, 3)
        narrow = Config(16, 0, block_k, 4, 3)
    elif block_r == 256:
        wide = narrow = Config(64, 0, block_k, 8, 4)  # a narrow tile spills
    elif block_r == 128:
        wide = Config(64, 0, block_k, 8, 4)
        narrow = Config(32, 0, block_k, 4, 4)
    else:
        wide = Config(64, 0, block_k, 4, 4)
        narrow = Config(16, 0, block_k, 4, 4)

    few_tokens = 512 if block_r < 64 else 1024
    table = [narrow, wide] if num_tokens <= few_tokens else [wide, narrow]
    if itemsize == 2 and block_r in _TALL_RANKS.get(target, ()) and num_tokens >= TALL_TOKENS:
        table.insert(0, Config(128, 0, 64, 8, 3))

    def fitted(config: Config) -> Config:
        bytes_per_stage = (config.block_m * itemsize + block_r * 4) * config.block_k
        return _fits(config, bytes_per_stage, target)

    return tuple(map(fitted, dict.fromkeys(table)))


@functools.lru_cache(maxsize=1024)
def up_projection(target: str, num_tokens: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """For y += h P, one tile of y per program. ``block_k`` is along the rank.

    The square tile is half as large as the wide one and has half the warps, so that there are twice as many
    programs. It is a candidate on sm_90 and sm_100; elsewhere it spills at rank 64.
    """
    block_k = min(block_r, rank_at_a_time(itemsize))
    square = [Config(64, 64, block_k, 4, 1)] if target in _HOPPER_ON else []
    wide = Config(64, 128, block_k, 8, 1)
    narrow = Config(16, 128, block_k, 4, 1)
    if num_tokens <= 32:
        return (narrow, *square, wide)
    return (wide, *square, narrow)


@functools.lru_cache(maxsize=1024)
def grad_a(target: str, num_tokens: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """For dA = gᵀ x: a tile of x (block_m tokens, block_k columns) per iteration, over the split's tokens.

    A sum over few tokens cannot be split into many parts: there narrow tiles give enough programs, each of
    which reads g again. Above rank 64 that is at least four times what they read of x.
    """
    block_m = 128 // itemsize
    if block_r > 64:
        table = [Config(block_m, 0, 128 // itemsize, 8, 3)]
    else:
        num_warps = 4 if block_r <= 32 else 8
        wide = Config(block_m, 0, 128, num_warps, 4)
        narrow = wide._replace(block_k=32)
        table = [narrow, wide] if num_tokens <= 512 else [wide, narrow]

    def fitted(config: Config) -> Config:
        bytes_per_stage = (config.block_k + block_r) * block_m * itemsize
        return _fits(config, bytes_per_stage, target)

    return tuple(map(fitted, table))


def is_x_first(
    target: str, config: Config, block_r: int, itemsize: int, is_aligned: bool, dropout: bool
) -> bool:
    """Whether `grad_a` forms xᵀ g, whose sum it transposes once, instead of gᵀ x.

    Hopper's and Blackwell's products of four warps have at least 64 rows. A padded rank of 16 or 32 has
    fewer, a tile of columns of x has 128: with x first there are such products, and g, which they read from
    shared memory, is loaded asynchronously as x is. Otherwise each step waits for g and multiplies in
    registers. At ranks 16 and 32 (8192 x 4096, bf16, Triton 3.9; 3.6 nearly the same) sm_90 takes 56 and 96
    registers instead of 73 and 130, sm_100 48 and 72 instead of 79 and 130.

    Elsewhere nothing is gained. sm_120 has no such products, and would load x synchronously into 168
    registers instead of 84. Tiles of 32 columns are too small, and rank 64 has these products either way.
    With dropout sm_100 takes 138 registers instead of 128, and sm_90 more instructions, in a loop that is
    bound by them. Where x is loaded number by number there are more registers, 243 instead of 195 on sm_90.

    Args:
        is_aligned: rows of x start and end at multiples of 16 numbers.
        dropout: whether there is any.
    """
    has_large_products = target in _HOPPER_ON and itemsize == 2
    has_rows = block_r <= 32 and config.block_k >= 64
    return has_large_products and has_rows and is_aligned and not dropout


# For what DoRA's backward needs of dy, on any target: a tile of it per program, read and written once.
GRAD_MAGNITUDE = (Config(32, 128, 0, 4, 1),)


# Up to this many rows of an expert, on average, its tiles are small: most of a large one would be empty.
FEW_ROWS = 32


@functools.lru_cache(maxsize=1024)
def experts_down(target: str, rows_each: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """`down_projection`'s tiles, by the average number of rows of an expert; no tall ones."""
    num_tokens = 1 if rows_each <= FEW_ROWS else TALL_TOKENS - 1
    return down_projection(target, num_tokens, block_r, itemsize)


@functools.lru_cache(maxsize=1024)
def experts_up(target: str, rows_each: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """`up_projection`'s tiles, by the average number of rows of an expert.

    The expert's rows and bias take registers. On sm_80, sm_89 and sm_120 the wide tile spills unless a step
    takes half of the rank: in fp32 from rank 64 on (178 registers instead of 255 on sm_80), with 16-bit
    numbers at rank 256, where the narrow tile spills too. On sm_100 the square one spills at rank 16.
    """
    table = up_projection(target, 1 if rows_each <= FEW_ROWS else MANY_TOKENS, block_r, itemsize)
    if target == "sm_100":
        return tuple(config for config in table if config.block_n > 64)
    if target in _HOPPER_ON or (itemsize == 2 and block_r < 256):
        return table

    half = rank_at_a_time(itemsize) // 2
    possible = []
    for config in table:
        is_narrow = config.block_m == 16
        if not is_narrow:
            possible.append(config._replace(block_k=min(config.block_k, half)))
        elif itemsize == 4:
            possible.append(config)
    return tuple(possible)


@functools.lru_cache(maxsize=1024)
def experts_grad_a(target: str, columns: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """`grad_a`'s tiles: wide ones where the ``columns`` of all experts together give enough programs."""
    num_tokens = MANY_TOKENS if columns >= 128 * PROGRAMS else 1
    return grad_a(target, num_tokens, block_r, itemsize)


@functools.lru_cache(maxsize=1024)
def fused_linear(
    target: str,
    num_tokens: int,
    out_features: int,
    block_r: int,
    is_aligned: bool,
    itemsize: int,
    dropout: bool,
) -> tuple[Config, ...]:
    """For x w + h P in one kernel.

    Where rows are not aligned, each number needs its own address, and only the small tile has enough
    registers. The large tile comes first for the wide sides of MLPs: for N = 14336, K = 4096 the kernel that
    it saves takes 13 % of the base product's time (modelled for an H100), so that 90 % of the vendor's speed
    is enough. Elsewhere it is a candidate. With dropout it spills, and above rank 64 it takes 254 registers.
    """
    block_k = 128 // itemsize
    narrow = Config(64, 64, block_k, 4, 3)
    # fp32 without Hopper's instructions: three TF32 products of a larger tile spill
    is_small = itemsize == 4 and target not in _HOPPER_ON
    wide = Config(128, 64 if is_small else 128, block_k, 8, 3)

    large = []
    if itemsize == 2 and target in _HOPPER_ON and num_tokens > 512 and block_r <= 64 and not dropout:
        # h and P lie in shared memory next to the main loop's buffers: one stage's worth for ranks above 16
        num_stages = 4 if block_r <= 16 else 3
        large = [Config(128, 256, block_k, 8, num_stages)]

    if not is_aligned:
        table = [narrow._replace(block_k=block_k // 2, num_stages=2)]
    elif num_tokens <= 512:
        table = [narrow, wide]
    elif num_tokens >= 4096 and out_features >= 8192:
        table = [*large, wide, narrow]
    else:
        table = [wide, *large, narrow]

    def fitted(config: Config) -> Config:
        bytes_per_stage = (config.block_m + config.block_n) * config.block_k * itemsize
        return _fits(config, bytes_per_stage, target)

    return tuple(map(fitted, table))
