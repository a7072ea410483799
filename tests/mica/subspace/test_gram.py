"""Streamed products equal the plain ones, whatever the number of blocks."""

import pytest
import torch

from mica.subspace import gram as module
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
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(shape, generator=generator).to(dtype)
    if not contiguous:
        tall = tall.mT.contiguous().mT
    exact = tall.double()
    leading = shape[:-2]
    for count in (1, 2):
        short = torch.randn(*leading, shape[-1], count, dtype=torch.float64, generator=generator)
        long = torch.randn(*leading, shape[-2], count, dtype=torch.float64, generator=generator)
        assert error(module.image(tall, short), exact @ short) <= EXACT
        assert error(module.transposed_image(tall, long), exact.mT @ long) <= EXACT
        # fp32 vectors are converted, not the product
        assert error(module.image(tall, short.float()), exact @ short.float().double()) <= EXACT
        assert error(module.transposed_image(tall, long.float()), exact.mT @ long.float().double()) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(100_000, 64), (3000, 4096), (2, 20_000, 100)], ids=str)
def test_blocks_bound_the_copy(dtype, shape):
    tall = torch.ones(1).expand(shape)
    seen = 0
    for rows, block in module.row_blocks(tall, dtype):
        assert block.dtype == dtype
        assert block.shape == (*shape[:-2], rows.stop - rows.start, shape[-1])
        bound = max(module.BLOCK_ELEMENTS, module.BLOCK_ROWS * shape[-1])
        assert block[..., :, :].numel() <= bound * len(tall.reshape(-1, *shape[-2:]))
        assert rows.start == seen
        seen = rows.stop
    assert seen == shape[-2]
