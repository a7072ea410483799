"""Launch configurations: at most three per kernel and target, chosen by shape, the first one by default.

All of them are compiled ahead of time for every target by `make static`. None has been timed: they follow
from the bytes and operations of each product and from what compiles without spills. Block sizes along the
rank are `padded_rank`, not part of a configuration. `FORMS` says which kernels a layer's formula consists of.
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
}
# Programs that keep every multiprocessor of a large GPU busy (132 on an H100). A constant, not the
# device's own number: splits depend on shapes only, and so do results.
PROGRAMS = 264
MANY_TOKENS = 8192  # more than any configuration asks for
# Multiplications of a base product up to which a layer whose operands have one dtype runs without kernels of
# ours: the device waits for the host, and PyTorch's operators under plain autograd take that less time. 256
# tokens of 4096 x 4096 (2^32) take an H100 about 15 µs, its host 3 to 10 for every launch. A guess: only the
# host's side was timed, with a driver that launches nothing.
HOST_BOUND = 2**32
FORM_NAMES = ("split", "mixed", "fused", "descriptor", "aten")  # of a layer, see `Forms`
TALL_TOKENS = 4096  # below, tall tiles are too few to fill the GPU without many parts of a split
# Their tensor cores read from shared memory and multiply for four warps: registers suffice for larger tiles.
_HOPPER_ON = ("sm_90", "sm_100")


class Config(NamedTuple):
    """Tile sizes (along tokens, out_features and the contracted side), warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Forms(NamedTuple):
    """What `mica.paths.triton_path` runs from so many tokens on, up to such a rank: one of five words each.

    split       the skinny product, then the base product by the vendor's library, then an update in place
    mixed       the same, the skinny products and dA by the vendor's library too: 16-bit numbers, no dropout
    fused       base product and update in one kernel, by pointers
    descriptor  the same, persistent and with tensor descriptors, where the operands allow them; else fused
    aten        none of these kernels: PyTorch's own operators

    ``source``: "measured", or "guess" for a row that nobody has timed.
    """

    tokens: int
    rank: int
    forward: str
    backward: str
    source: str = "measured"


# From rank 128 on each row of tiles of `down_projection` reads an A as large as its own part of x again, and
# `grad_a` g four times; the vendor's tiles are larger. sglang #26962 and #27087 measured that split of the
# work as the fastest on a B200.
_WIDE_RANKS = (Forms(2048, 127, "split", "split", "guess"), Forms(2048, 256, "mixed", "mixed", "guess"))
# By the name of the device what was fastest there, as ``make gpu`` prints it; by the target what is guessed
# for a device without rows of its own. The first row counts that fits.
FORMS: dict[str, tuple[Forms, ...]] = {"sm_90": _WIDE_RANKS, "sm_100": _WIDE_RANKS}
UNMEASURED = Forms(0, 256, "split", "split", "guess")


def forms_of(name: str, target: str, tokens: int, rank: int) -> Forms:
    """``name``: `torch.cuda.get_device_name` of the device."""
    rows = FORMS.get(name) or FORMS.get(target, ())
    return next((row for row in rows if tokens >= row.tokens and rank <= row.rank), UNMEASURED)


def rank_at_a_time(itemsize: int) -> int:
    """How much of the rank one step of a wide product takes: 128 bytes. With more, fp32 operands spill."""
    return 128 // itemsize


def _fits(config: Config, bytes_per_stage: int, target: str) -> Config:
    """The configuration with as many stages as the shared memory of the target holds (90 % of it)."""
    limit = SHARED_MEMORY.get(target, min(SHARED_MEMORY.values())) * 9 // 10
    return config._replace(num_stages=max(1, min(config.num_stages, limit // bytes_per_stage)))


# Pure functions of their arguments, so cached results cannot become wrong.


@functools.lru_cache(maxsize=1024)
def down_projection(target: str, num_tokens: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """For h = x Pᵀ. ``itemsize``: bytes of one number in the product. A thin K tile for wide ranks.

    A wide rank needs small tiles of tokens earlier: each part of a split costs as much as h does. With many
    tokens tall ones read P half as often, through the L2 cache: 34 MB at rank 64, next to 67 MB of x (8192 x
    4096). On sm_90 they take 54, 80 and 128 registers at ranks 32, 64 and 128, so three, three and two
    programs run at once; on sm_100 134 at rank 128, for one. At rank 256 they spill.
    """
    block_k = max(32, 256 // itemsize * 16 // max(16, block_r // 2))
    if block_r == 32:  # with 128 an fp32 P takes 120 KB of shared memory: one program, for 1.9 waves
        block_k = 64
    if block_r * itemsize >= 1024:  # fp32 at rank 256: three TF32 products spill with larger tiles
        wide, narrow = Config(32, 0, block_k, 8, 3), Config(16, 0, block_k, 4, 3)
    elif block_r >= 128:
        wide, narrow = Config(64, 0, block_k, 8, 4), Config(32, 0, block_k, 4, 4)
        narrow = wide if block_r == 256 else narrow  # spills
    else:
        wide, narrow = Config(64, 0, block_k, 4, 4), Config(16, 0, block_k, 4, 4)
    table = [narrow, wide] if num_tokens <= (512 if block_r < 64 else 1024) else [wide, narrow]
    tall_ranks = {"sm_90": (32, 64, 128), "sm_100": (32, 64)}.get(target, ())
    if itemsize == 2 and block_r in tall_ranks and num_tokens >= TALL_TOKENS:
        table = [Config(128, 0, 64, 8, 3), *table]
    return tuple(
        _fits(c, (c.block_m * itemsize + block_r * 4) * c.block_k, target) for c in dict.fromkeys(table)
    )


@functools.lru_cache(maxsize=1024)
def up_projection(target: str, num_tokens: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """For y += h P: one tile of y per program. block_k is of the rank.

    The square tile is half as large, for twice as many programs of half the warps: a candidate from Hopper
    on; before, it spills at rank 64.
    """
    block_k = min(block_r, rank_at_a_time(itemsize))
    square = [Config(64, 64, block_k, 4, 1)] if target in _HOPPER_ON else []
    wide, narrow = Config(64, 128, block_k, 8, 1), Config(16, 128, block_k, 4, 1)
    return (narrow, *square, wide) if num_tokens <= 32 else (wide, *square, narrow)


@functools.lru_cache(maxsize=1024)
def grad_a(target: str, num_tokens: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """For dA = gᵀ x: a tile of x (block_m tokens, block_k columns) per iteration, over the split's tokens.

    Few tokens cannot be split much: there narrow tiles give enough programs, each of which reads g again.
    Above rank 64 that is at least four times what they read of x.
    """
    block_m = 128 // itemsize
    if block_r <= 64:
        wide = Config(block_m, 0, 128, 4 if block_r <= 32 else 8, 4)
        narrow = wide._replace(block_k=32)
        table = [narrow, wide] if num_tokens <= 512 else [wide, narrow]
    else:
        table = [Config(block_m, 0, 64 if itemsize == 2 else 32, 8, 3)]
    return tuple(_fits(c, (c.block_k + block_r) * block_m * itemsize, target) for c in table)


# Rows of an expert, on average, up to which its tiles are small: most of a large one would be empty.
FEW_ROWS = 32


@functools.lru_cache(maxsize=1024)
def experts_down(target: str, rows_each: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """`down_projection`'s tiles, by the average number of rows of an expert; no tall ones."""
    return down_projection(target, 1 if rows_each <= FEW_ROWS else TALL_TOKENS - 1, block_r, itemsize)


@functools.lru_cache(maxsize=1024)
def experts_up(target: str, rows_each: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """`up_projection`'s tiles, by the average number of rows of an expert.

    The expert's rows and bias take registers. Before Hopper, and on sm_120, the wide tile spills unless a
    step takes half of the rank: in fp32 from rank 64 on (178 registers instead of 255 on sm_80), with 16-bit
    numbers at rank 256, where the narrow one spills too. On sm_100 the square one does at rank 16.
    """
    table = up_projection(target, 1 if rows_each <= FEW_ROWS else MANY_TOKENS, block_r, itemsize)
    if target == "sm_100":
        return tuple(c for c in table if c.block_n > 64)
    if target in _HOPPER_ON:
        return table
    if itemsize == 2 and block_r < 256:
        return table
    half = rank_at_a_time(itemsize) // 2
    halved = (c._replace(block_k=min(c.block_k, half)) if c.block_m > 16 else c for c in table)
    return tuple(c for c in halved if c.block_m > 16 or itemsize == 4)


@functools.lru_cache(maxsize=1024)
def experts_grad_a(target: str, columns: int, block_r: int, itemsize: int) -> tuple[Config, ...]:
    """`grad_a`'s tiles: wide ones where the ``columns`` of all experts together give enough programs."""
    return grad_a(target, MANY_TOKENS if columns >= 128 * PROGRAMS else 1, block_r, itemsize)


@functools.lru_cache(maxsize=1024)
def fused_linear(
    target: str,
    num_tokens: int,
    out_features: int,
    block_r: int,
    is_aligned: bool,
    itemsize: int,
    descriptor: bool,
    dropout: bool,
) -> tuple[Config, ...]:
    """For x w + h P in one kernel, by pointers or by tensor descriptors.

    Where rows are not aligned each number needs its own address: only the small tile has enough registers.
    The large one comes first for the wide sides of MLPs: for N = 14336, K = 4096 the kernel that it saves
    takes 13 % of the base product's time (modelled for an H100), so 90 % of the vendor's speed is enough.
    Elsewhere it is a candidate. With dropout it spills, and with ranks above 64 it takes 254 registers.
    """
    block_k = 128 // itemsize
    narrow = Config(64, 64, block_k, 4, 3)
    # fp32 without Hopper's instructions: three TF32 products of a larger tile spill
    is_large = itemsize == 2 or target in _HOPPER_ON
    wide = Config(128, 128, block_k, 8, 3) if is_large else Config(128, 64, block_k, 8, 3)
    large = []
    if itemsize == 2 and target in _HOPPER_ON and num_tokens > 512 and block_r <= 64 and not dropout:
        # h and P lie in shared memory next to the main loop's buffers: one stage's worth for ranks above 16
        large = [Config(128, 256, block_k, 8, (3 if descriptor else 4) - (block_r > 16))]
    is_mlp = num_tokens >= 4096 and out_features >= 8192
    if descriptor:
        only = wide if is_large else Config(64, 128, block_k, 8, 2)
        table = [*large, only] if is_mlp else [only, *large]
    elif not is_aligned:
        table = [narrow._replace(block_k=block_k // 2, num_stages=2)]
    else:
        many = [*large, wide, narrow] if is_mlp else [wide, *large, narrow]
        table = [narrow, wide] if num_tokens <= 512 else many
    return tuple(_fits(c, (c.block_m + c.block_n) * c.block_k * itemsize, target) for c in table)
