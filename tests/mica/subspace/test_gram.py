"""Streamed products equal the plain ones, whatever the number of blocks and panels."""

import pytest
import torch
from tolerances import RELATIVE, error

from mica.subspace import gram as module

EXACT = RELATIVE[torch.float64]


# Shapes with one and with several panels, cut into one block, several, and one for each row.
CASES = [
    ((7, 7), 1 << 20),
    ((7, 7), 1),
    ((50, 3), 20),
    ((9, 1), 4),
    ((140, 129), 1 << 20),
    ((140, 129), 3000),
    ((600, 530), 1 << 20),
]


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("shape", "block_elements"), CASES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_products(dtype, shape, block_elements, contiguous, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(shape, generator=generator).to(dtype)
    if not contiguous:
        tall = tall.T.contiguous().T
    exact = tall.double()
    product = module.gram(tall)
    assert error(product, exact.T @ exact) <= EXACT
    assert error(product, product.T) <= EXACT

    short = torch.randn(shape[1], 2, dtype=torch.float64, generator=generator)
    long = torch.randn(shape[0], 2, dtype=torch.float64, generator=generator)
    assert error(module.image(tall, short), exact @ short) <= EXACT
    assert error(module.transposed_image(tall, long), exact.T @ long) <= EXACT
    # fp32 vectors are converted, not the product
    assert error(module.image(tall, short.float()), exact @ short.float().double()) <= EXACT
    assert error(module.transposed_image(tall, long.float()), exact.T @ long.float().double()) <= EXACT


def test_blocks_bound_the_fp64_copy():
    tall = torch.ones(100_000, 64)
    seen = 0
    for rows, block in module.row_blocks(tall):
        assert block.dtype == torch.float64
        assert block.numel() <= module.BLOCK_ELEMENTS
        assert rows.start == seen
        seen = rows.stop
    assert seen == len(tall)
