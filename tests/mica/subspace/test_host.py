"""Every product and factor of ``HostGram`` is the dense one's, in any order of calls; threads come back."""

import itertools

import numpy as np
import pytest
import torch

from mica.dtypes import FLOATING
from mica.subspace import gram as products
from mica.subspace import host
from mica.subspace.host import HostGram, partial_eigenvectors
from tests.support.judging import assert_orthonormal, columns, gram_of, random
from tests.support.spectra import weight
from tests.support.tolerances import error

LAYOUTS = ["rows", "columns", "strided"]


def laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "columns":
        return columns(matrix)
    if layout == "strided":
        buffer = torch.full((2 * matrix.shape[0], 3 * matrix.shape[1]), torch.nan, dtype=matrix.dtype)
        buffer[::2, ::3] = matrix
        return buffer[::2, ::3]
    return matrix


class Checked:
    """A ``HostGram`` and the dense matrix; each method makes one call and compares."""

    def __init__(self, tall: torch.Tensor):
        self.gram = HostGram(tall)
        self.dense = gram_of(tall)
        self.values, self.vectors = torch.linalg.eigh(self.dense)
        self.norm = self.values[-1]
        self.unit = torch.eye(len(self.dense), dtype=torch.float64)
        self.right = random(self.gram.size, 3)
        self.shift: torch.Tensor | None = None  # of the factor that there is

    def one_column(self):
        one = self.right[:, :1]
        assert error(self.gram.apply(one), self.dense @ one) <= 1e-13

    def columns(self):
        assert error(self.gram.apply(self.right), self.dense @ self.right) <= 1e-13
        # entry by entry: nothing lost on the diagonal, whatever was put there in between
        assert error(self.gram.apply(columns(self.unit)), self.dense) <= 1e-14

    def factor(self, share=-0.3):
        self.shift = self.values[0] + share * self.norm
        assert self.gram.factor(self.shift)
        self.solve()

    def other_factor(self):
        self.factor(-2)

    def refused_factor(self):
        assert not self.gram.factor(self.values[0] + 0.1 * self.norm)
        self.shift = None

    def solve(self):
        if self.shift is not None:
            before = self.right.clone()
            expected = torch.linalg.solve(self.dense - self.shift * self.unit, before)
            assert error(self.gram.solve(self.right), expected) <= 1e-12
            assert error(self.gram.solve(self.right[:, 2:]), expected[:, 2:]) <= 1e-12
            assert torch.equal(self.right, before)

    def exceeds(self):
        """Raised by 2 ‖C‖ on its two smallest vectors, C is above what is below its third eigenvalue."""
        self.shift = None
        count = min(2, self.gram.size - 1)
        minor = columns(self.vectors[:, :count])
        margin = 1e-3 * self.norm
        assert self.gram.exceeds(minor, 2 * self.norm, self.values[count] - margin)
        assert not self.gram.exceeds(minor, 2 * self.norm, self.values[count] + margin)
        assert not self.gram.exceeds(self.vectors[:, 1 : count + 1], 2 * self.norm, self.values[0] + margin)

    def smallest(self):
        for count in {1, self.gram.size}:
            basis = self.gram.smallest(count)
            assert error(self.dense @ basis, basis * self.values[:count]) <= 1e-12
            assert_orthonormal(basis)


CALLS = [
    "one_column", "columns", "factor", "other_factor", "refused_factor", "solve", "exceeds", "smallest",
]  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("first", CALLS)
def test_any_three_calls_in_any_order(first, scale, monkeypatch):
    monkeypatch.setattr(host, "_MIRROR_BLOCK", 4)
    tall = scale * weight("gaussian", 14, 9)
    for rest in itertools.product(CALLS, repeat=2):
        checked = Checked(tall)
        for call in (first, *rest):
            getattr(checked, call)()
        checked.columns()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 12, 13])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_sizes_around_the_mirrored_blocks(size, layout, monkeypatch):
    monkeypatch.setattr(host, "_MIRROR_BLOCK", 4)
    checked = Checked(laid_out(weight("gaussian", size + 5, size), layout))
    for call in CALLS:
        if size > 1 or call not in ("exceeds", "refused_factor"):
            getattr(checked, call)()


@pytest.mark.parametrize("shape", [(300, 270), (520, 512)], ids=str)
def test_the_mirrored_blocks_as_they_are(shape):
    checked = Checked(weight("gaussian", *shape))
    for call in ("factor", "exceeds", "columns"):
        getattr(checked, call)()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 4, 512])
def test_the_gram_of_any_dtype_and_layout_in_blocks(dtype, layout, rows, monkeypatch):
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(products, "BLOCK_ROWS", rows)
    matrix = weight("gaussian", 23, 6).to(dtype)
    gram = HostGram(laid_out(matrix, layout))
    assert error(gram.apply(torch.eye(6, dtype=torch.float64)), gram_of(matrix)) <= 1e-14
    assert gram.error == 0
    assert (gram.size, gram.batch_shape, gram.device) == (6, (), torch.device("cpu"))


def test_the_largest_diagonal_shows_what_is_not_finite():
    matrix = weight("gaussian", 20, 7).double()
    assert HostGram(matrix).largest_diagonal == pytest.approx(matrix.square().sum(0).max().item())
    for bad in (torch.nan, torch.inf, -torch.inf, 1e200):
        matrix[3, 5] = bad
        assert not HostGram(matrix).largest_diagonal < 1e308


def test_thin_products():
    gram = HostGram(weight("gaussian", 30, 20))
    left, right, coefficients = random(20, 4), random(20, 3, seed=1), random(4, 3, seed=2)
    assert error(gram.inner(left, right), left.T @ right) <= 1e-14
    for layout in (coefficients, coefficients.contiguous(), coefficients.flip(-1).flip(-1)):
        assert error(gram.combine(left, layout), left @ coefficients) <= 1e-14
    assert error(gram.subtract(right.clone(), left, coefficients), right - left @ coefficients) <= 1e-14
    empty = gram.empty(5)
    assert (empty.shape, empty.dtype) == ((20, 5), torch.float64)
    assert empty.T.is_contiguous()


@pytest.mark.parametrize("kind", ["independent", "dependent", "nearly dependent", "zero"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_orthonormal_vectors_however_dependent(kind, scale):
    vectors = random(40, 6)
    vectors[:, 5] = {
        "independent": vectors[:, 5],
        "dependent": vectors[:, 0] - 2 * vectors[:, 3],
        "nearly dependent": vectors[:, 0] + 1e-9 * vectors[:, 5],
        "zero": torch.zeros(40, dtype=torch.float64),
    }[kind]
    vectors *= scale
    before = vectors.clone()
    basis, triangle, safe = HostGram(weight("gaussian", 50, 40)).orthonormal(vectors)
    assert safe == (kind == "independent")
    assert_orthonormal(basis)
    assert error(basis @ triangle, before) <= 1e-13
    assert torch.equal(triangle, triangle.triu())
    assert torch.equal(vectors, before)


@pytest.mark.parametrize("size", [1, 2, 5, 12, 13, 60])
@pytest.mark.parametrize("count", [1, 2, 10, 60])
@pytest.mark.parametrize("fails", [False, True])
def test_partial_eigenvectors_read_the_lower_triangle(size, count, fails, monkeypatch):
    """LAPACK's inverse iteration may fail to converge, or lose a vector of a cluster: all are found then."""
    if fails:
        monkeypatch.setattr("mica.subspace.lapack.smallest_eigenvectors", lambda matrix, count: None)
    count = min(count, size)
    dense = gram_of(weight("cluster across", size + 3, size))
    half = np.asfortranarray(dense.numpy().copy())
    half[np.triu_indices(size, 1)] = np.nan
    before = half.copy()
    vectors = torch.from_numpy(partial_eigenvectors(half, count))
    assert vectors.shape == (size, count)
    assert vectors.T.is_contiguous()
    assert_orthonormal(vectors)
    values = torch.linalg.eigvalsh(dense)[:count]
    assert error(vectors.T @ dense @ vectors, torch.diag(values)) <= 1e-12
    np.testing.assert_array_equal(half, before)
