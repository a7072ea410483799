"""SciPy's BLAS and LAPACK without the interpreter lock: fp64, column-major, in place where documented.

SciPy's own Python wrappers hold the lock while they compute, so that threads take turns: two solved the 210
layers of SmolLM2-135M in 5.6 s where one took 5.1. ``ctypes`` releases it. The pointers are those that
SciPy publishes for Cython (``scipy.linalg.cython_blas``, ``cython_lapack``).

A matrix is a NumPy array whose columns are contiguous (a column-major array or some columns of one). One that
is only read is copied if it is not of that kind; one that is written must be. Sizes are not checked here.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import numpy as np
from numpy import ndarray
from scipy.linalg import LinAlgError, cython_blas, cython_lapack

# SciPy's integers have 32 bits, or 64 if it was built so (1.18 on). Small numbers at the beginning of 64 bits
# are both, on little-endian machines.
_Integer = ctypes.c_int64 if sys.byteorder == "little" else ctypes.c_int32
_NUMPY_INTEGER = np.dtype(_Integer)

_PANEL = 128  # rows of a Cholesky factor made at a time
_BLOCK = 70  # LAPACK's blocks have up to 64 columns; a workspace of this many is never too small

# The time of inverse iteration grows with the number of vectors, that of divide and conquer hardly does. They
# are even for an eighth of them with n from 64 to 576, and for a seventh with 1024.
_DIVIDE_FROM_SHARE = 8

_UPPER = b"U"
_LOWER = b"L"
_PLAIN = b"N"
_TRANSPOSED = b"T"
_LEFT = b"L"
_RIGHT = b"R"
_NOT_UNIT = b"N"  # the diagonal of a triangle need not be 1
_BY_INDEX = b"I"
_OF_TRIDIAGONAL = b"I"  # and not of the matrix that was made tridiagonal
_BY_BLOCK = b"B"


# Arguments that are only read are made once: a routine takes ten of them, and a small matrix some 60
# routines.
@functools.lru_cache(1024)
def _int(value: int):
    return ctypes.byref(_Integer(value))


@functools.lru_cache(64)
def _double(value: float):
    return ctypes.byref(ctypes.c_double(value))


_POINTER_TO = {int: _int, float: _double, bytes: bytes}


def _has_contiguous_columns(matrix: ndarray) -> bool:
    if matrix.flags.f_contiguous:
        return True
    step, stride = matrix.strides
    return step == 8 and stride >= 8 * len(matrix) and stride % 8 == 0


def routine(module, name: str, count: int):
    """The routine of ``count`` arguments behind one of SciPy's capsules.

    It is called with numbers, vectors and matrices. A matrix stands for two of the arguments: its address and
    the distance of two columns, in numbers.
    """
    capsule = module.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = api.PyCapsule_GetName(capsule)
    if signature.count(b",") + 1 != count:
        raise ImportError(f"SciPy's {name} takes other arguments than LAPACK's: {signature.decode()}")
    address = api.PyCapsule_GetPointer(capsule, signature)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(address)

    def call(*arguments) -> None:
        pointers = []
        for argument in arguments:
            if not isinstance(argument, ndarray):
                pointer_to = _POINTER_TO.get(type(argument), ctypes.byref)
                pointers.append(pointer_to(argument))
                continue
            pointers.append(argument.__array_interface__["data"][0])
            if argument.ndim != 2:
                continue
            if argument.flags.f_contiguous:  # NumPy's stride of a single column may be anything
                pointers.append(_int(max(1, len(argument))))
            else:
                pointers.append(_int(argument.strides[1] // 8))
        function(*pointers)

    return call


def _read(matrix: ndarray) -> ndarray:
    """A matrix as a routine can read it: itself, or a copy."""
    if matrix.dtype == np.float64 and _has_contiguous_columns(matrix):
        return matrix
    return np.asfortranarray(matrix, dtype=np.float64)


def _written(matrix: ndarray) -> ndarray:
    """The matrix itself; ValueError if no routine can write to it."""
    if matrix.dtype != np.float64 or not _has_contiguous_columns(matrix) or not matrix.flags.writeable:
        raise ValueError(f"cannot write to a {matrix.dtype} array with strides {matrix.strides}")
    return matrix


_dgemm = routine(cython_blas, "dgemm", 13)
_dsyrk = routine(cython_blas, "dsyrk", 10)
_dsymm = routine(cython_blas, "dsymm", 12)
_dsymv = routine(cython_blas, "dsymv", 10)
_dtrsm = routine(cython_blas, "dtrsm", 11)
_dpotrf = routine(cython_lapack, "dpotrf", 5)
_dsytrd = routine(cython_lapack, "dsytrd", 10)
dstebz = routine(cython_lapack, "dstebz", 18)
_dstein = routine(cython_lapack, "dstein", 13)
_dstedc = routine(cython_lapack, "dstedc", 11)
_dormtr = routine(cython_lapack, "dormtr", 13)


# The smallest eigenvalues (count), ascending, their vectors (n, count), and the largest eigenvalue ().
Eigenpairs = tuple[ndarray, ndarray, ndarray]


def _empty(rows: int, columns: int) -> ndarray:
    return np.empty((rows, columns), order="F")


def gemm(
    left: ndarray,
    right: ndarray,
    *,
    transposed: bool = False,
    alpha: float = 1.0,
    into: ndarray | None = None,
) -> ndarray:
    """alpha · left @ right, or alpha · leftᵀ @ right if ``transposed``; added to ``into``, in place."""
    left = _read(left)
    right = _read(right)
    if transposed:
        inner, rows = left.shape
        operation = _TRANSPOSED
    else:
        rows, inner = left.shape
        operation = _PLAIN
    columns = right.shape[1]
    if into is None:
        target = _empty(rows, columns)
        beta = 0.0
    else:
        target = _written(into)
        beta = 1.0
    _dgemm(operation, _PLAIN, rows, columns, inner, alpha, left, right, beta, target)
    return target


def syrk(
    factor: ndarray,
    *,
    transposed: bool = False,
    lower: bool = False,
    alpha: float = 1.0,
    into: ndarray | None = None,
) -> ndarray:
    """One triangle of alpha · factor @ factorᵀ, or alpha · factorᵀ @ factor if ``transposed``.

    It is added to ``into``, in place. Without ``into`` the other triangle is zero.
    """
    factor = _read(factor)
    if transposed:
        inner, size = factor.shape
        operation = _TRANSPOSED
    else:
        size, inner = factor.shape
        operation = _PLAIN
    if into is None:
        target = np.zeros((size, size), order="F")
    else:
        target = _written(into)
    triangle = _LOWER if lower else _UPPER
    _dsyrk(triangle, operation, size, inner, alpha, factor, 1.0, target)
    return target


def symm(symmetric: ndarray, right: ndarray) -> ndarray:
    """symmetric @ right; only the lower triangle of ``symmetric`` is read."""
    symmetric = _read(symmetric)
    right = _read(right)
    size, columns = right.shape
    target = _empty(size, columns)
    if columns == 1:
        # dsymm takes 5 times as long for one column (n = 576: 0.21 against 0.04 ms)
        _dsymv(_LOWER, size, 1.0, symmetric, right[:, 0], 1, 0.0, target[:, 0], 1)
    else:
        _dsymm(_LEFT, _LOWER, size, columns, 1.0, symmetric, right, 0.0, target)
    return target


def trsm(
    triangle: ndarray, right: ndarray, *, transposed: bool = False, on_the_right: bool = False
) -> ndarray:
    """Solve triangle · x = right for x, in place of ``right``; the triangle is an upper one.

    With ``transposed`` it is triangleᵀ · x = right, with ``on_the_right`` x · triangle = right.
    """
    triangle = _read(triangle)
    target = _written(right)
    rows, columns = target.shape
    side = _RIGHT if on_the_right else _LEFT
    operation = _TRANSPOSED if transposed else _PLAIN
    _dtrsm(side, _UPPER, operation, _NOT_UNIT, rows, columns, 1.0, triangle, target)
    return target


def potrf(matrix: ndarray) -> bool:
    """Write the upper Cholesky factor over the upper triangle of a symmetric matrix.

    Returns whether there is one. It is made in panels, because a rank-k update is faster than LAPACK's
    recursion (n = 4096, 2 threads: 202 against 218 ms; n = 1024: 6.2 against 7.2).
    """
    _written(matrix)
    for start in range(0, len(matrix), _PANEL):
        end = start + _PANEL
        corner = matrix[start:end, start:end]
        row = matrix[start:end, end:]
        rest = matrix[end:, end:]
        if _run(_dpotrf, _UPPER, len(corner), corner):
            return False
        if row.size:
            trsm(corner, row, transposed=True)
            syrk(row, transposed=True, alpha=-1.0, into=rest)
    return True


def smallest_eigenpairs(matrix: ndarray, count: int) -> Eigenpairs:
    """The smallest eigenpairs of a symmetric matrix, and its largest eigenvalue.

    Only the lower triangle of the symmetric ``matrix`` (n, n) is read. These are the steps of LAPACK's dsyevr
    and dsyevd; but dsyevr does not show the largest eigenvalue, and dsyevd would transform all vectors back
    from those of the tridiagonal matrix (n = 576: 10 of 29 ms). The vectors are orthonormal to rounding, even
    those of inverse iteration: within 3e-15 on clusters of hundreds, with n up to 800.

    Raises:
        LinAlgError: LAPACK does not converge.
    """
    reflectors = np.array(matrix, dtype=np.float64, order="F")
    size = len(reflectors)
    diagonal, below, factors = np.empty((3, size))
    work = np.empty(_BLOCK * (_BLOCK + size))
    _run(_dsytrd, _LOWER, size, reflectors, diagonal, below, factors, work, len(work))
    pairs = None
    if _DIVIDE_FROM_SHARE * count < size:
        pairs = _by_bisection(diagonal, below, count)
    values, vectors, largest = pairs or _by_division(diagonal, below, count)
    _run(_dormtr, _LEFT, _LOWER, _PLAIN, size, count, reflectors, factors, vectors, work, len(work))
    return values, vectors, largest


def _by_division(diagonal: ndarray, below: ndarray, count: int) -> Eigenpairs:
    """`smallest_eigenpairs` of a tridiagonal matrix, by divide and conquer of all; both are overwritten."""
    size = len(diagonal)
    vectors = _empty(size, size)
    work = np.empty(1 + 4 * size + size * size)
    integers = np.empty(3 + 5 * size, _NUMPY_INTEGER)
    workspaces = (work, len(work), integers, len(integers))
    if _run(_dstedc, _OF_TRIDIAGONAL, size, diagonal, below, vectors, *workspaces):
        raise LinAlgError(f"dstedc did not converge on a matrix of size {size}")
    return diagonal[:count], vectors[:, :count].copy(order="F"), diagonal[-1, ...]


def _by_bisection(diagonal: ndarray, below: ndarray, count: int) -> Eigenpairs | None:
    """`smallest_eigenpairs` of a tridiagonal matrix, by bisection and inverse iteration.

    None where LAPACK fails or finds fewer, as its inverse iteration may inside a cluster.
    """
    size = len(diagonal)
    work = np.empty(5 * size)
    blocks, splits, integers, failed = np.empty((4, 3 * size), _NUMPY_INTEGER)

    def bisect(first: int, last: int) -> ndarray:
        values = np.empty(size)
        found = _Integer(0)
        which = (_BY_INDEX, _BY_BLOCK, size, 0.0, 0.0, first, last, 0.0)
        results = (found, _Integer(0), values, blocks, splits)
        if _run(dstebz, *which, diagonal, below, *results, work, integers):
            return values[:0]
        return values[: found.value & 0xFFFFFFFF]

    largest = bisect(size, size)
    values = bisect(1, count)
    if len(values) != count or len(largest) != 1:
        return None
    vectors = _empty(size, count)
    operands = (size, diagonal, below, count, values, blocks, splits, vectors)
    if _run(_dstein, *operands, work, integers, failed):
        return None
    order = values.argsort()  # they ascend in each block
    return values[order], np.asfortranarray(vectors[:, order]), largest[0, ...]


def _run(function, *arguments) -> int:
    """Call a routine; returns LAPACK's ``info``, of which only the first 32 bits are sure to be written."""
    info = _Integer(0)
    function(*arguments, info)
    code = info.value
    if sys.byteorder == "little":
        code = ctypes.c_int32.from_buffer(info).value
    if code < 0:
        raise ValueError(f"LAPACK's argument {-code} had an illegal value")
    return code
