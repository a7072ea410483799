"""Streamed products, and every product and factor of a Gram matrix are the dense ones."""

import itertools

import pytest
import torch

from mica.dtypes import FLOATING
from mica.subspace import gram as products
from mica.subspace import host
from mica.subspace.batched import BatchGram
from mica.subspace.host import HostGram
from tests.support.judging import assert_orthonormal, columns, dense, gram_of, random
from tests.support.spectra import weight
from tests.support.tolerances import RELATIVE, error

of_each_kind = pytest.mark.parametrize("kind", [HostGram, BatchGram])
LAYOUTS = ["rows", "columns", "strided"]


def laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "columns":
        return columns(matrix)
    if layout == "strided":
        buffer = torch.full((2 * matrix.shape[0], 3 * matrix.shape[1]), torch.nan, dtype=matrix.dtype)
        buffer[::2, ::3] = matrix
        return buffer[::2, ::3]
    return matrix


# Streamed products

# Shapes, elements and rows of a block: one block, several with a rest, and one for each row.
BLOCKS = [
    ((7, 7), 1 << 20, 512), ((7, 7), 1, 1), ((50, 3), 20, 1), ((50, 3), 20, 16), ((9, 1), 4, 1),
    ((3, 50, 20), 300, 1), ((2, 2, 9, 4), 1 << 20, 512), ((1100, 30), 1, 512),
]  # fmt: skip


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("shape", "elements", "rows"), BLOCKS, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_products(dtype, shape, elements, rows, contiguous, blocks_of):
    blocks_of(rows, elements)
    tall = random(*shape).contiguous().to(dtype)
    tall, exact = tall if contiguous else columns(tall), tall.double()
    for count in (1, 2):
        short, long = random(*shape[:-2], shape[-1], count), random(*shape[:-1], count, seed=1)
        for wide in (torch.float64, torch.float32):  # fp32 vectors are converted, not the product
            short, long = short.to(wide), long.to(wide)
            assert error(products.image(tall, short), exact @ short.double()) <= RELATIVE[torch.float64]
            transposed = products.transposed_image(tall, long)
            assert error(transposed, exact.mT @ long.double()) <= RELATIVE[torch.float64]


@pytest.mark.parametrize("shape", [(100_000, 64), (3000, 4096), (2, 20_000, 100)], ids=str)
def test_blocks_bound_the_copy(shape):
    tall, seen = torch.ones(1).expand(shape), 0
    bound = max(products.BLOCK_ELEMENTS, products.BLOCK_ROWS * shape[-1])
    for rows, block in products.row_blocks(tall):
        assert block.dtype == torch.float64
        assert block.shape == (*shape[:-2], rows.stop - rows.start, shape[-1])
        assert block.shape[-2] * block.shape[-1] <= bound
        assert rows.start == seen
        seen = rows.stop
    assert seen == shape[-2]


# Gram matrices


class Checked:
    """A Gram matrix, or those of a batch, and the dense ones; each method makes one call and compares."""

    def __init__(self, tall: torch.Tensor, kind: type = HostGram):
        if kind is BatchGram:
            tall = torch.stack([tall, 2 * tall.flip(0), 3 * tall.flip(1)])
        self.gram = kind(tall)
        self.dense = gram_of(tall)
        self.values, self.vectors = torch.linalg.eigh(self.dense)
        self.norm = self.values[..., -1]
        self.unit = torch.eye(self.gram.size, dtype=torch.float64)
        self.right = random(*self.gram.batch_shape, self.gram.size, 3)
        self.shift: torch.Tensor | None = None  # of the factor that there is

    def one_column(self):
        one = self.right[..., :1]
        assert error(self.gram.apply(one), self.dense @ one) <= 1e-13

    def columns(self):
        assert error(self.gram.apply(self.right), self.dense @ self.right) <= 1e-13
        # entry by entry: nothing lost on the diagonal, whatever was put there in between
        assert error(dense(self.gram), self.dense) <= 1e-14

    def factor(self, share=-0.3):
        self.shift = self.values[..., 0] + share * self.norm
        assert self.gram.factor(self.shift).all()
        self.solve()

    def other_factor(self):
        self.factor(-2)

    def refused_factor(self):
        assert not self.gram.factor(self.values[..., 0] + 0.1 * self.norm).any()
        self.shift = None

    def solve(self):
        if self.shift is not None:
            before = self.right.clone()
            expected = torch.linalg.solve(self.dense - self.shift[..., None, None] * self.unit, before)
            assert error(self.gram.solve(self.right), expected) <= 1e-12
            assert error(self.gram.solve(self.right[..., 2:]), expected[..., 2:]) <= 1e-12
            assert torch.equal(self.right, before)

    def exceeds(self):
        """Raised by 2 ‖C‖ on its two smallest vectors, C is above what is below its third eigenvalue."""
        self.shift = None
        count = min(2, self.gram.size - 1)
        minor, others = columns(self.vectors[..., :count]), self.vectors[..., 1 : count + 1]
        edge, margin = self.values[..., count], 1e-3 * self.norm
        assert self.gram.exceeds(minor, 2 * self.norm, edge - margin).all()
        assert not self.gram.exceeds(minor, 2 * self.norm, edge + margin).any()
        assert not self.gram.exceeds(others, 2 * self.norm, self.values[..., 0] + margin).any()

    def smallest(self):
        for count in {1, self.gram.size}:
            values, basis, norm = self.gram.smallest(count)
            assert error(values, self.values[..., :count]) <= 1e-13
            torch.testing.assert_close(norm, self.values[..., -1])
            assert error(self.dense @ basis, basis * self.values[..., None, :count]) <= 1e-12
            assert_orthonormal(basis)


CALLS = [
    "one_column", "columns", "factor", "other_factor", "refused_factor", "solve", "exceeds", "smallest",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "scale"), [(HostGram, 1e-4), (BatchGram, 1e4)])
@pytest.mark.parametrize("first", CALLS)
@pytest.mark.whole
def test_any_three_calls_in_any_order(first, scale, kind, monkeypatch):
    monkeypatch.setattr(host, "_MIRROR_BLOCK", 4)
    tall = scale * weight("gaussian", 14, 9)
    for rest in itertools.product(CALLS, repeat=2):
        checked = Checked(tall, kind)
        for call in (first, *rest, "columns"):
            getattr(checked, call)()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 12, 13])
@pytest.mark.parametrize("layout", LAYOUTS)
@of_each_kind
def test_all_sizes_around_the_mirrored_blocks(size, layout, kind, monkeypatch):
    monkeypatch.setattr(host, "_MIRROR_BLOCK", 4)
    checked = Checked(laid_out(weight("gaussian", size + 5, size), layout), kind)
    for call in CALLS if size > 1 else [*CALLS[:4], "solve", "smallest"]:
        getattr(checked, call)()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 4, 512])
@of_each_kind
def test_the_gram_of_any_dtype_and_layout_in_blocks(dtype, layout, rows, kind, blocks_of):
    blocks_of(rows)
    tall = laid_out(weight("gaussian", 23, 6).to(dtype), layout)
    tall = tall if kind is HostGram else tall.expand(3, 23, 6)
    gram = kind(tall)
    assert error(dense(gram), gram_of(tall)) <= 1e-14
    assert (gram.size, gram.batch_shape, gram.device) == (6, tall.shape[:-2], torch.device("cpu"))


@pytest.mark.whole
@pytest.mark.parametrize("trouble", ["independent", "dependent", "nearly dependent", "zero"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("count", [1, 6])
@of_each_kind
def test_orthonormal_vectors_however_dependent(trouble, scale, count, kind):
    """In a batch all are safe or none."""
    gram = Checked(weight("gaussian", 50, 40), kind).gram
    vectors = random(*gram.batch_shape, 40, count)
    one = vectors if kind is HostGram else vectors[1]
    one[:, -1] = {
        "independent": one[:, -1],
        "dependent": one[:, 0] - 2 * one[:, count // 2],
        "nearly dependent": one[:, 0] + 1e-9 * one[:, -1],
        "zero": torch.zeros(40, dtype=torch.float64),
    }[trouble]
    vectors *= scale
    before = vectors.clone()
    basis, triangle, safe = gram.orthonormal(vectors)
    assert safe == (trouble == "independent" or (count == 1 and trouble != "zero"))
    assert_orthonormal(basis)
    assert error(basis @ triangle, before) <= 1e-13
    assert torch.equal(triangle, triangle.triu())
    assert torch.equal(vectors, before)
