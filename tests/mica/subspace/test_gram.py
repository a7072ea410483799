"""Streamed products equal the plain ones, whatever the number of blocks."""

import pytest
import torch

from mica.subspace import gram as module
from tests.support.judging import columns, random
from tests.support.tolerances import RELATIVE, error

EXACT = RELATIVE[torch.float64]

# Shapes, elements and rows of a block: one block, several with a rest, and one for each row.
CASES = [
    ((7, 7), 1 << 20, 512),
    ((7, 7), 1, 1),
    ((50, 3), 20, 1),
    ((50, 3), 20, 16),
    ((9, 1), 4, 1),
    ((3, 50, 20), 300, 1),
    ((2, 2, 9, 4), 1 << 20, 512),
    ((1100, 30), 1, 512),
]


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("shape", "elements", "rows"), CASES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_products(dtype, shape, elements, rows, contiguous, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(module, "BLOCK_ROWS", rows)
    tall = random(*shape).contiguous().to(dtype)
    tall = tall if contiguous else columns(tall)
    exact = tall.double()
    for count in (1, 2):
        short, long = random(*shape[:-2], shape[-1], count), random(*shape[:-1], count, seed=1)
        for wide in (torch.float64, torch.float32):  # fp32 vectors are converted, not the product
            short, long = short.to(wide), long.to(wide)
            assert error(module.image(tall, short), exact @ short.double()) <= EXACT
            assert error(module.transposed_image(tall, long), exact.mT @ long.double()) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(100_000, 64), (3000, 4096), (2, 20_000, 100)], ids=str)
def test_blocks_bound_the_copy(dtype, shape):
    tall = torch.ones(1).expand(shape)
    seen = 0
    for rows, block in module.row_blocks(tall, dtype):
        assert block.dtype == dtype
        assert block.shape == (*shape[:-2], rows.stop - rows.start, shape[-1])
        bound = max(module.BLOCK_ELEMENTS, module.BLOCK_ROWS * shape[-1])
        assert block.numel() <= bound * len(tall.reshape(-1, *shape[-2:]))
        assert rows.start == seen
        seen = rows.stop
    assert seen == shape[-2]
