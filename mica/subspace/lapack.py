"""SciPy's BLAS and LAPACK without the interpreter lock: fp64, column-major, in place where documented.

SciPy's own Python wrappers hold the lock while they compute, so that threads take turns: two solved the 210
layers of SmolLM2-135M in 5.6 s where one took 5.1. ``ctypes`` releases it. The pointers are those that
SciPy publishes for Cython (``scipy.linalg.cython_blas``, ``cython_lapack``).

A matrix is a NumPy array whose columns are contiguous (a column-major array or some columns of one). What is
only read is copied if it is not; what is written must be. Sizes are not checked here.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import numpy as np
from scipy.linalg import LinAlgError, cython_blas, cython_lapack

# SciPy's integers have 32 bits, or 64 if it was built so (1.18 on). Small numbers at the beginning of 64 bits
# are both, on little-endian machines.
_Integer = ctypes.c_int64 if sys.byteorder == "little" else ctypes.c_int32
_NUMPY_INTEGER = np.dtype(_Integer)

_PANEL = 128  # rows of a Cholesky factor made at a time

_UPPER, _LOWER = b"U", b"L"
_PLAIN, _TRANSPOSED = b"N", b"T"


# Arguments that are only read, made once: a routine takes ten of them, and small matrices some 60 routines.
@functools.lru_cache(1024)
def _int(value: int):
    return ctypes.byref(_Integer(value))


@functools.lru_cache(64)
def _double(value: float):
    return ctypes.byref(ctypes.c_double(value))


_POINTER_TO = {int: _int, float: _double, bytes: bytes}


def _success(info) -> int:
    """LAPACK's ``info``, of which only the first 32 bits are sure to have been written."""
    code = ctypes.c_int32.from_buffer(info).value if sys.byteorder == "little" else info.value
    if code < 0:
        raise ValueError(f"LAPACK's argument {-code} had an illegal value")
    return code


def _has_contiguous_columns(matrix: np.ndarray) -> bool:
    if matrix.flags.f_contiguous:
        return True
    step, stride = matrix.strides
    return step == 8 and stride >= 8 * len(matrix) and stride % 8 == 0


def routine(module, name: str, count: int):
    """The routine of ``count`` arguments behind one of SciPy's capsules.

    To be called with numbers, vectors, and matrices, each of which stands for two arguments: its address and
    the distance of two columns, in numbers.
    """
    capsule = module.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
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
            if isinstance(argument, np.ndarray):
                pointers.append(argument.__array_interface__["data"][0])
                if argument.ndim == 2:
                    contiguous = argument.flags.f_contiguous
                    pointers.append(_int(max(1, len(argument)) if contiguous else argument.strides[1] // 8))
            else:
                pointers.append(_POINTER_TO.get(type(argument), ctypes.byref)(argument))
        function(*pointers)

    return call


def _read(matrix: np.ndarray) -> np.ndarray:
    if matrix.dtype == np.float64 and _has_contiguous_columns(matrix):
        return matrix
    return np.asfortranarray(matrix, dtype=np.float64)


def _written(matrix: np.ndarray) -> np.ndarray:
    if matrix.dtype != np.float64 or not _has_contiguous_columns(matrix) or not matrix.flags.writeable:
        raise ValueError(f"cannot write to a {matrix.dtype} array with strides {matrix.strides}")
    return matrix


_dgemm = routine(cython_blas, "dgemm", 13)
_dsyrk = routine(cython_blas, "dsyrk", 10)
_dsymm = routine(cython_blas, "dsymm", 12)
_dsymv = routine(cython_blas, "dsymv", 10)
_dtrsm = routine(cython_blas, "dtrsm", 11)
_dpotrf = routine(cython_lapack, "dpotrf", 5)
dsyevr = routine(cython_lapack, "dsyevr", 21)
_dsyevd = routine(cython_lapack, "dsyevd", 11)


def _empty(rows: int, columns: int) -> np.ndarray:
    return np.empty((rows, columns), order="F")


def gemm(
    left: np.ndarray,
    right: np.ndarray,
    *,
    transposed: bool = False,
    alpha: float = 1.0,
    into: np.ndarray | None = None,
) -> np.ndarray:
    """alpha · left @ right, or leftᵀ @ right; added to ``into``, if given, in place."""
    left, right = _read(left), _read(right)
    rows, inner = left.shape[::-1] if transposed else left.shape
    columns = right.shape[1]
    target = _empty(rows, columns) if into is None else _written(into)
    operation, beta = _TRANSPOSED if transposed else _PLAIN, 0.0 if into is None else 1.0
    _dgemm(operation, _PLAIN, rows, columns, inner, alpha, left, right, beta, target)
    return target


def syrk(
    factor: np.ndarray,
    *,
    transposed: bool = False,
    lower: bool = False,
    alpha: float = 1.0,
    into: np.ndarray | None = None,
) -> np.ndarray:
    """One triangle of alpha · factor @ factorᵀ, or factorᵀ @ factor; added to ``into``, in place.

    Without ``into`` the other triangle is zero.
    """
    factor = _read(factor)
    size, inner = factor.shape[::-1] if transposed else factor.shape
    target = np.zeros((size, size), order="F") if into is None else _written(into)
    triangle, operation = _LOWER if lower else _UPPER, _TRANSPOSED if transposed else _PLAIN
    _dsyrk(triangle, operation, size, inner, alpha, factor, 1.0, target)
    return target


def symm(symmetric: np.ndarray, right: np.ndarray) -> np.ndarray:
    """symmetric @ right; of ``symmetric`` the lower triangle is read."""
    symmetric, right = _read(symmetric), _read(right)
    size, columns = right.shape
    target = _empty(size, columns)
    if columns == 1:
        # dsymm takes 5 times as long for one column (n = 576: 0.21 against 0.04 ms)
        _dsymv(_LOWER, size, 1.0, symmetric, right[:, 0], 1, 0.0, target[:, 0], 1)
    else:
        _dsymm(b"L", _LOWER, size, columns, 1.0, symmetric, right, 0.0, target)
    return target


def trsm(
    triangle: np.ndarray, right: np.ndarray, *, transposed: bool = False, on_the_right: bool = False
) -> np.ndarray:
    """Solve triangle · x = right (triangleᵀ · x, or x · triangle) for x, in place; upper triangle."""
    triangle, target = _read(triangle), _written(right)
    rows, columns = target.shape
    side, operation = b"R" if on_the_right else b"L", _TRANSPOSED if transposed else _PLAIN
    _dtrsm(side, _UPPER, operation, b"N", rows, columns, 1.0, triangle, target)
    return target


def potrf(matrix: np.ndarray) -> bool:
    """The upper Cholesky factor of a symmetric matrix over its upper triangle; whether there is one.

    In panels, because a rank-k update is faster than LAPACK's recursion (n = 4096, 2 threads: 202 against
    218 ms; n = 1024: 6.2 against 7.2).
    """
    _written(matrix)
    for start in range(0, len(matrix), _PANEL):
        end = start + _PANEL
        corner, row, rest = matrix[start:end, start:end], matrix[start:end, end:], matrix[end:, end:]
        info = _Integer(0)
        _dpotrf(_UPPER, len(corner), corner, info)
        if _success(info):
            return False
        if row.size:
            trsm(corner, row, transposed=True)
            syrk(row, transposed=True, alpha=-1.0, into=rest)
    return True


def smallest_eigenvectors(matrix: np.ndarray, count: int) -> np.ndarray | None:
    """(n, count), ascending, by bisection or relatively robust representations; the lower triangle is read.

    None where LAPACK fails or finds fewer, as its inverse iteration may inside a cluster.
    """
    work_matrix = np.array(matrix, dtype=np.float64, order="F")  # overwritten
    size = len(work_matrix)
    number, values, vectors = _Integer(0), np.empty(size), _empty(size, count)
    support = np.zeros(2 * max(1, count), _NUMPY_INTEGER)
    which = (b"V", b"I", _LOWER, size, work_matrix, 0.0, 0.0, 1, count, 0.0)
    code = _with_workspace(dsyevr, *which, number, values, vectors, support)
    return vectors if code == 0 and number.value & 0xFFFFFFFF == count else None


def all_eigenvectors(matrix: np.ndarray) -> np.ndarray:
    """(n, n), ascending, by divide and conquer; the lower triangle is read. LinAlgError if it fails."""
    vectors = np.array(matrix, dtype=np.float64, order="F")
    size = len(vectors)
    if _with_workspace(_dsyevd, b"V", _LOWER, size, vectors, np.empty(size)):
        raise LinAlgError(f"dsyevd did not converge on a matrix of size {size}")
    return vectors


def _with_workspace(function, *arguments) -> int:
    """Call with no workspace, which returns its size, and then with that; LAPACK's ``info``."""
    work, integers, info = np.zeros(1), np.zeros(1, _NUMPY_INTEGER), _Integer(0)
    function(*arguments, work, -1, integers, -1, info)
    count = int(integers.view(np.int32)[0]) if sys.byteorder == "little" else int(integers[0])
    work, integers = np.empty(max(1, int(work[0]))), np.zeros(max(1, count), _NUMPY_INTEGER)
    function(*arguments, work, len(work), integers, len(integers), info)
    return _success(info)
