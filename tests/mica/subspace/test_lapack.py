"""BLAS and LAPACK by pointer: every layout, nothing read or written next to the operands, no lock held."""

import ctypes
import math
from contextlib import contextmanager

import numpy as np
import pytest
from scipy.linalg import LinAlgError

from mica.subspace import lapack

SIZES = [(1, 1), (1, 4), (4, 1), (5, 3), (3, 5), (33, 17)]
LAYOUTS = ["columns", "padded", "rows", "strided"]
in_each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def random(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def laid_out(matrix: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers; "padded" and "strided" ones lie in a buffer of NaN."""
    rows, columns = matrix.shape
    if layout == "columns":
        return np.asfortranarray(matrix)
    if layout == "rows":
        return np.ascontiguousarray(matrix)
    step = 1 if layout == "padded" else 2
    buffer = np.full((step * rows + 3, step * columns + 2), np.nan, order="F")
    view = buffer[1 : 1 + step * rows : step, : step * columns : step]
    view[:] = matrix
    return view


@contextmanager
def written(matrix: np.ndarray):
    """A view with the numbers in a buffer of NaN, which is there afterwards."""
    view = laid_out(matrix, "padded")
    yield view
    around = view.base.copy()
    around[1 : 1 + view.shape[0], : view.shape[1]] = np.nan
    assert np.isnan(around).all()


def symmetric(size: int) -> np.ndarray:
    matrix = random(size, size)
    return matrix + matrix.T


def with_nan_above(matrix: np.ndarray) -> np.ndarray:
    matrix = matrix.copy()
    matrix[np.triu_indices(len(matrix), 1)] = np.nan
    return matrix


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-13) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=tolerance)


@in_each_layout
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), SIZES, ids=str)
def test_gemm_and_syrk(rows, columns, transposed, layout):
    left = random(rows, columns)
    factor = left.T if transposed else left
    right, before = random(factor.shape[1], 6, seed=1), random(factor.shape[0], 6, seed=2)
    operands, options = [laid_out(each, layout) for each in (left, right)], {"transposed": transposed}
    fresh = lapack.gemm(*operands, alpha=-0.5, **options)
    assert fresh.flags.f_contiguous
    close(fresh, -0.5 * factor @ right)
    with written(before) as target:
        assert lapack.gemm(*operands, alpha=-0.5, into=target, **options) is target
        close(target, before - 0.5 * factor @ right)
    dense = factor @ factor.T
    before = random(*dense.shape, seed=1)
    for options["lower"], half in ((True, np.tril), (False, np.triu)):
        close(lapack.syrk(operands[0], alpha=2.0, **options), half(2 * dense))
        with written(before) as target:
            lapack.syrk(operands[0], into=target, **options)
            close(target, before + half(dense))
    np.testing.assert_array_equal(operands[0], left)


@in_each_layout
@pytest.mark.parametrize("columns", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 33])
def test_symm_reads_the_lower_triangle_and_trsm_the_upper_one(size, columns, layout):
    matrix, right = symmetric(size), random(size, columns, seed=1)
    product = lapack.symm(laid_out(with_nan_above(matrix), layout), laid_out(right, layout))
    assert product.shape == (size, columns)
    close(product, matrix @ right, 1e-12)

    dense = np.triu(random(size, size)) + 4 * np.eye(size)
    triangle = laid_out(with_nan_above(dense.T).T, layout)
    for transposed, on_the_right in ((False, False), (True, False), (False, True)):
        before = right.T if on_the_right else right
        with written(before) as target:
            solution = lapack.trsm(triangle, target, transposed=transposed, on_the_right=on_the_right)
            assert solution is target
            operator = dense.T if transposed else dense
            close(solution @ operator if on_the_right else operator @ solution, before, 1e-12)


@pytest.mark.parametrize("size", [1, 2, 33, 127, 128, 129, 256, 300])
def test_potrf_in_the_upper_triangle(size):
    factor = random(size, size + 2)
    dense = factor @ factor.T + np.eye(size)
    strictly_below = np.tril_indices(size, -1)
    with written(dense) as target:
        target[strictly_below] = 7.0
        assert lapack.potrf(target)
        assert (target[strictly_below] == 7.0).all()
        product = np.triu(target).T @ np.triu(target)
        np.testing.assert_allclose(product, dense, rtol=0, atol=1e-14 * dense.max())
    for place in {0, size // 2, size - 1}:
        broken = np.asfortranarray(dense)
        broken[place, place] = -1.0
        assert not lapack.potrf(broken)


@pytest.mark.whole
@in_each_layout
@pytest.mark.parametrize("size", [1, 2, 5, 20, 60])
@pytest.mark.parametrize("share", [0, 8, math.inf])
@pytest.mark.parametrize("kind", ["any", "diagonal", "cluster", "two blocks"])
def test_eigenpairs_of_the_lower_triangle(size, layout, share, kind, monkeypatch):
    """By bisection, by divide and conquer, and as it is chosen: the smallest, in order, and the largest."""
    monkeypatch.setattr(lapack, "_DIVIDE_FROM_SHARE", share)
    matrix = spectrum_of(kind, size)
    exact = np.linalg.eigvalsh(matrix)
    operand = laid_out(with_nan_above(matrix), layout)
    before = operand.copy()
    for count in {1, min(3, size), size}:
        values, vectors, largest = lapack.smallest_eigenpairs(operand, count)
        assert vectors.shape == (size, count)
        assert vectors.flags.f_contiguous
        close(values, exact[:count], 1e-12)
        close(largest, exact[-1])
        close(matrix @ vectors, vectors * values, 1e-12)
        close(vectors.T @ vectors, np.eye(count))
    np.testing.assert_array_equal(operand, before)


def spectrum_of(kind: str, size: int) -> np.ndarray:
    """A symmetric matrix; of the last three kinds, LAPACK solves parts of the tridiagonal one separately."""
    matrix = symmetric(size)
    if kind == "diagonal":
        return np.diag(matrix.diagonal())
    if kind == "cluster":
        unit = np.linalg.qr(matrix)[0]
        return unit @ np.diag(np.arange(size) > size // 2) @ unit.T
    if kind == "two blocks":
        matrix[: size // 2, size // 2 :] = matrix[size // 2 :, : size // 2] = 0
    return matrix


def test_eigenpairs_that_cannot_be_found(monkeypatch):
    """Bisection may find fewer than requested, or inverse iteration fail: then all are found another way."""
    with pytest.raises(LinAlgError, match="size 5"):
        lapack.smallest_eigenpairs(np.full((5, 5), np.nan), 2)
    matrix = symmetric(40)
    exact = np.linalg.eigvalsh(matrix)[:3]

    def loses_one(*arguments):
        bisect(*arguments)
        if arguments[5] == 1:  # the smallest, not the largest
            arguments[10].value -= 1  # the number of those found

    def fails(*arguments):
        arguments[-1].value = 1

    bisect = lapack.dstebz
    for name, routine in (("dstebz", loses_one), ("_dstein", fails)):
        with monkeypatch.context() as patch:
            patch.setattr(lapack, name, routine)
            values, vectors, _ = lapack.smallest_eigenpairs(matrix, 3)
        close(values, exact)
        close(matrix @ vectors, vectors * values, 1e-12)


WRITERS = {
    "potrf": lambda target: lapack.potrf(target),
    "trsm": lambda target: lapack.trsm(np.eye(4), target),
    "gemm": lambda target: lapack.gemm(np.eye(4), np.eye(4), into=target),
    "syrk": lambda target: lapack.syrk(np.eye(4), into=target),
}


@pytest.mark.parametrize("call", WRITERS)
def test_what_cannot_be_written_is_refused(call):
    target = np.asfortranarray(np.eye(4))
    unfit = [laid_out(target, "rows"), laid_out(target, "strided"), target.astype(np.float32), target]
    target.flags.writeable = False
    for each in unfit:
        with pytest.raises(ValueError, match="cannot write"):
            WRITERS[call](each)
        np.testing.assert_array_equal(each, np.eye(4))


@pytest.mark.parametrize("integer", [ctypes.c_int64, ctypes.c_int32])
def test_integers_of_either_width_and_no_routine_of_other_arguments(integer, monkeypatch):
    """A build with 32-bit integers finds them at the beginning of 64 bits."""
    monkeypatch.setattr(lapack, "_Integer", integer)
    monkeypatch.setattr(lapack, "_NUMPY_INTEGER", np.dtype(integer))
    matrix = symmetric(40)
    values = np.linalg.eigvalsh(matrix)
    for count in (3, 30):
        _, vectors, _ = lapack.smallest_eigenpairs(matrix, count)
        close(matrix @ vectors, vectors * values[:count], 1e-12)
    assert not lapack.potrf(np.asfortranarray(-np.eye(3)))
    with pytest.raises(ImportError, match="dgemm takes other arguments"):
        lapack.routine(lapack.cython_blas, "dgemm", 12)
