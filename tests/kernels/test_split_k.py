"""How sums are split. Each sum itself is tested with its kernel."""

import pytest
import torch

from mica.kernels import configs
from mica.kernels.down_projection import down_projection
from mica.kernels.grad_a import grad_a
from mica.kernels.split_k import split_evenly
from tests.support.kernel_cases import DEVICE


def test_parts_are_scaled_after_they_are_added():
    """As the sum of one program is: the same parts, added in order, have the same bits."""
    x, factor = torch.randn(40, 2049, device=DEVICE), torch.randn(6, 2049, device=DEVICE)
    call = down_projection.plan(x, factor, scale=0.7)
    h, launch = call.bind()
    launch()
    total = torch.zeros_like(h)
    for part in launch.args["partial_ptr"].view(launch.args["num_splits"], *h.shape):
        total += part
    assert torch.equal(h, total * torch.tensor(launch.args["scale"], device=DEVICE))  # fp32, as in kernels


@pytest.mark.parametrize("length", [1, 300, 4096, 4097, 14336])
@pytest.mark.parametrize(("block", "tiles"), [(64, 1), (128, 128), (32, 3), (64, 1000)])
@pytest.mark.parametrize(("columns", "itemsize"), [(16, 2), (64, 4), (256, 2)])
def test_splits_cover_the_length_once(length, block, tiles, columns, itemsize):
    per_split, splits = split_evenly(length, block, tiles, columns, itemsize)
    assert per_split % block == 0
    assert (splits - 1) * per_split < length <= splits * per_split
    assert splits == 1 or per_split >= 2 * block
    assert splits == 1 or splits * tiles <= configs.PROGRAMS
    share = 1 if tiles <= configs.PROGRAMS / 4 else 4
    assert splits == 1 or 8 * columns * splits <= length * itemsize / share  # bytes of the parts


@pytest.mark.parametrize(
    ("tokens", "rank", "down", "grad"),
    [
        (8192, 16, (128, 2), (32, 8)),
        (8192, 64, (64, 4), (32, 8)),
        (512, 16, (32, 8), (128, 2)),
        (512, 64, (32, 8), (128, 1)),
        (256, 16, (16, 16), (128, 1)),
        (1, 16, (1, 16), (128, 1)),
    ],
)
def test_small_grids_are_filled_where_the_work_allows(tokens, rank, down, grad):
    """Grids for bf16 x (tokens, 4096): about 264 programs, but where their parts would cost too much."""
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta")
    factor = torch.empty(rank, 4096, device="meta")
    h = torch.empty(tokens, rank, dtype=torch.bfloat16, device="meta")
    for call, grid in ((down_projection.plan(x, factor), down), (grad_a.plan(h, x, rank=rank), grad)):
        _, launch = call.bind()
        assert launch.grid == grid
        tiles, splits = grid
        if splits > 1:
            assert launch.args["counter_ptr"].numel() == tiles
