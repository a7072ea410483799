"""fp64 products with a weight that is itself never copied whole to fp64.

All functions take the weight in tall orientation: ``tall`` is a (..., long, short) view of it, long >= short,
in any supported dtype; they convert it to fp64 one block of rows at a time. Products of two fp32 (or
bf16, fp16) numbers are exact in fp64, so the only rounding is that of the sums.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements in one block, which are 8 MiB in fp64, and the fewest rows, which make blocks larger from 2048
# columns on. On a 576 x 49152 embedding, blocks of 32 MiB no longer fit the cache and take 1.3 times as long.
BLOCK_ELEMENTS = 1 << 20
BLOCK_ROWS = 512


def row_blocks(tall: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, tall[..., rows, :] in fp64), covering all rows in order.

    A block is valid until the next one is asked for: blocks share their memory, because new memory has to be
    mapped page by page (10 of 73 ms for the Gram of 1024 x 4096).
    """
    long_features, short_features = tall.shape[-2:]
    step = max(BLOCK_ROWS, BLOCK_ELEMENTS // short_features)
    if tall.device.type != "cpu":  # which has no cache to stay in, but each block costs a launch
        step *= 8
    memory = None
    for start in range(0, long_features, step):
        rows = slice(start, min(start + step, long_features))
        block = tall[..., rows, :]
        if tall.dtype == torch.float64:
            yield rows, block
        elif memory is None:
            memory = block.double()
            yield rows, memory
        else:
            converted = memory[..., : rows.stop - rows.start, :]
            yield rows, converted.copy_(block)


def extremes(matrix: Tensor) -> Tensor:
    """The smallest and the largest entry of a matrix, (2,) in its dtype: NaN if any entry is.

    It is the cheapest way to see whether all entries are finite: ``isfinite().all()`` takes 2.3 ms for
    1536 x 576, this 0.24.
    """
    # Not by torch.stack, which under autocast refuses tensors of the other 16-bit dtype
    result = matrix.new_empty(2)
    # On a transposed view aminmax is slow: 100 against 2 ms for 576 x 49152
    rows = matrix.detach() if matrix.is_contiguous() else matrix.detach().mT
    torch.aminmax(rows, out=(result[0], result[1]))
    return result


def image(tall: Tensor, short_vectors: Tensor) -> Tensor:
    """tall @ short_vectors: (..., long, count) fp64, for short_vectors (..., short, count)."""
    short_vectors = short_vectors.double()
    shape = (*tall.shape[:-2], short_vectors.shape[-1], tall.shape[-2])
    result = torch.empty(shape, dtype=torch.float64, device=tall.device)
    for rows, block in row_blocks(tall):
        # The transposed product is faster: 54 against 92 ms for 576 x 49152, 16 vectors
        result[..., rows] = short_vectors.mT @ block.mT
    return result.mT


def transposed_image(tall: Tensor, long_vectors: Tensor) -> Tensor:
    """tallᵀ @ long_vectors: (..., short, count) fp64, for long_vectors (..., long, count)."""
    shape = (*tall.shape[:-2], long_vectors.shape[-1], tall.shape[-1])
    result = torch.zeros(shape, dtype=torch.float64, device=tall.device)
    for rows, block in row_blocks(tall):
        result += long_vectors[..., rows, :].double().mT @ block
    return result.mT
