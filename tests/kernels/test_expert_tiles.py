import pytest
import torch
import triton
import triton.language as tl

from mica.kernels.expert_tiles import block_e, most_tiles, tile_of
from tests.support.expert_cases import ROUTES, offsets_of, route, slices
from tests.support.kernel_cases import DEVICE, draw
from tests.support.properties import given, st


@triton.jit
def _tiles_kernel(offsets_ptr, out_ptr, num_rows, num_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    tile = tl.program_id(0)
    expert, first, end = tile_of(offsets_ptr, tile, num_rows, num_experts, BLOCK_E, BLOCK_M)
    tl.store(out_ptr + 3 * tile, expert)
    tl.store(out_ptr + 3 * tile + 1, first)
    tl.store(out_ptr + 3 * tile + 2, end)


def tiles(num_rows, ends, block_m, tail=True, dtype=torch.int32):
    """(expert, first row, end) of all programs."""
    count = most_tiles(num_rows, len(ends), block_m, tail)
    out = torch.full((max(1, count), 3), -1, dtype=torch.int32, device=DEVICE)
    offsets = offsets_of(ends, dtype)
    if count:
        _tiles_kernel[(count,)](offsets, out, num_rows, len(ends), block_e(len(ends)), block_m)
    return out[:count].tolist()


def check(num_rows, ends, block_m, **options):
    """Every row is in one tile, of its own expert; only the tiles' numbers of `most_tiles` are needed."""
    owners = [[] for _ in range(num_rows)]
    for expert, first, end in tiles(num_rows, ends, block_m, **options):
        for row in range(first, min(first + block_m, end)):
            owners[row].append(expert)
    expected = [
        [expert]
        for expert, rows in enumerate(slices([*ends, num_rows]))
        for _ in range(rows.start, rows.stop)
    ]
    if not options.get("tail", True):
        expected[ends[-1] :] = owners[ends[-1] :]
    assert owners == expected


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize(("block_m", "dtype"), [(4, torch.int64), (64, torch.int32)])
def test_every_row_is_in_one_tile(name, block_m, dtype):
    check(*ROUTES[name], block_m, dtype=dtype)


@given(counts=draw.counts, leftover=draw.leftovers, block_m=st.sampled_from([4, 8, 16]))
def test_any_route(counts, leftover, block_m):
    check(*route(counts, leftover), block_m)
    check(*route(counts, leftover), block_m, tail=False)


def test_many_experts():
    """As many as a vector holds, and one more."""
    for experts in (32, 33):
        check(40, [min(expert // 2, 39) for expert in range(experts)], 16)
