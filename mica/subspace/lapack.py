"""SciPy's BLAS and LAPACK without the interpreter lock: fp64, column-major, in place where said.

SciPy's own Python wrappers hold the lock while they compute, so that threads take turns: two solved the 210
layers of SmolLM2-135M in 5.6 s where one took 5.1. ``ctypes`` lets go of it. The pointers are those that
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


def _routine(module, name: str, count: int):
    """The routine of ``count`` arguments behind one of SciPy's capsules."""
    capsule = module.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = api.PyCapsule_GetName(capsule)
    if signature.count(b",") + 1 != count:
        raise ImportError(f"SciPy's {name} takes other arguments than LAPACK's: {signature.decode()}")
    address = api.PyCapsule_GetPointer(capsule, signature)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(address)


_dgemm = _routine(cython_blas, "dgemm", 13)
_dsyrk = _routine(cython_blas, "dsyrk", 10)
_dsymm = _routine(cython_blas, "dsymm", 12)
_dsymv = _routine(cython_blas, "dsymv", 10)
_dtrsm = _routine(cython_blas, "dtrsm", 11)
_dpotrf = _routine(cython_lapack, "dpotrf", 5)
_dsyevr = _routine(cython_lapack, "dsyevr", 21)
_dsyevd = _routine(cython_lapack, "dsyevd", 11)


# Arguments that are only read, made once: a routine takes ten of them, and small matrices some 60 routines.
@functools.lru_cache(1024)
def _int(value: int):
    return ctypes.byref(_Integer(value))


@functools.lru_cache(64)
def _double(value: float):
    return ctypes.byref(ctypes.c_double(value))


def _success(info) -> int:
    """LAPACK's ``info``, of which only the first 32 bits are sure to have been written."""
    code = ctypes.c_int32.from_buffer(info).value if sys.byteorder == "little" else info.value
    if code < 0:
        raise ValueError(f"LAPACK's argument {-code} had an illegal value")
    return code


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _has_contiguous_columns(matrix: np.ndarray) -> bool:
    if matrix.flags.f_contiguous:
        return True
    step, stride = matrix.strides
    return step == 8 and stride >= 8 * len(matrix) and stride % 8 == 0


def _leading(matrix: np.ndarray):
    """The distance of two columns, in numbers."""
    rows = len(matrix)
    return _int(max(1, rows) if matrix.flags.f_contiguous else matrix.strides[1] // 8)


def _read(matrix: np.ndarray) -> np.ndarray:
    if matrix.dtype == np.float64 and _has_contiguous_columns(matrix):
        return matrix
    return np.asfortranarray(matrix, dtype=np.float64)


def _written(matrix: np.ndarray) -> np.ndarray:
    if matrix.dtype != np.float64 or not _has_contiguous_columns(matrix) or not matrix.flags.writeable:
        raise ValueError(f"cannot write to a {matrix.dtype} array with strides {matrix.strides}")
    return matrix


def empty(rows: int, columns: int) -> np.ndarray:
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
    target = empty(rows, columns) if into is None else _written(into)
    _dgemm(
        _TRANSPOSED if transposed else _PLAIN,
        _PLAIN,
        _int(rows),
        _int(columns),
        _int(inner),
        _double(alpha),
        _address(left),
        _leading(left),
        _address(right),
        _leading(right),
        _double(0.0 if into is None else 1.0),
        _address(target),
        _leading(target),
    )
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
    _dsyrk(
        _LOWER if lower else _UPPER,
        _TRANSPOSED if transposed else _PLAIN,
        _int(size),
        _int(inner),
        _double(alpha),
        _address(factor),
        _leading(factor),
        _double(1.0),
        _address(target),
        _leading(target),
    )
    return target


def symm(symmetric: np.ndarray, right: np.ndarray) -> np.ndarray:
    """symmetric @ right; of ``symmetric`` the lower triangle is read."""
    symmetric, right = _read(symmetric), _read(right)
    size, columns = right.shape
    target = empty(size, columns)
    if columns == 1:
        # dsymm takes 5 times as long for one column (n = 576: 0.21 against 0.04 ms)
        _dsymv(
            _LOWER,
            _int(size),
            _double(1.0),
            _address(symmetric),
            _leading(symmetric),
            _address(right),
            _int(1),
            _double(0.0),
            _address(target),
            _int(1),
        )
        return target
    _dsymm(
        b"L",
        _LOWER,
        _int(size),
        _int(columns),
        _double(1.0),
        _address(symmetric),
        _leading(symmetric),
        _address(right),
        _leading(right),
        _double(0.0),
        _address(target),
        _leading(target),
    )
    return target


def trsm(
    triangle: np.ndarray, right: np.ndarray, *, transposed: bool = False, on_the_right: bool = False
) -> np.ndarray:
    """Solve triangle · x = right (triangleᵀ · x, or x · triangle) for x, in place; upper triangle."""
    triangle, target = _read(triangle), _written(right)
    rows, columns = target.shape
    _dtrsm(
        b"R" if on_the_right else b"L",
        _UPPER,
        _TRANSPOSED if transposed else _PLAIN,
        b"N",
        _int(rows),
        _int(columns),
        _double(1.0),
        _address(triangle),
        _leading(triangle),
        _address(target),
        _leading(target),
    )
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
        _dpotrf(_UPPER, _int(len(corner)), _address(corner), _leading(matrix), ctypes.byref(info))
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
    found, info = _Integer(0), _Integer(0)
    values, vectors = np.empty(size), empty(size, count)
    support = np.zeros(2 * max(1, count), _NUMPY_INTEGER)

    def call(work: np.ndarray, integers: np.ndarray, query: bool) -> None:
        _dsyevr(
            b"V",
            b"I",
            _LOWER,
            _int(size),
            _address(work_matrix),
            _leading(work_matrix),
            _double(0.0),
            _double(0.0),
            _int(1),
            _int(count),
            _double(0.0),
            ctypes.byref(found),
            _address(values),
            _address(vectors),
            _leading(vectors),
            _address(support),
            _address(work),
            _int(-1 if query else len(work)),
            _address(integers),
            _int(-1 if query else len(integers)),
            ctypes.byref(info),
        )

    _with_workspace(call)
    return vectors if _success(info) == 0 and found.value & 0xFFFFFFFF == count else None


def all_eigenvectors(matrix: np.ndarray) -> np.ndarray:
    """(n, n), ascending, by divide and conquer; the lower triangle is read. LinAlgError if it fails."""
    vectors = np.array(matrix, dtype=np.float64, order="F")
    size, info = len(vectors), _Integer(0)
    values = np.empty(size)

    def call(work: np.ndarray, integers: np.ndarray, query: bool) -> None:
        _dsyevd(
            b"V",
            _LOWER,
            _int(size),
            _address(vectors),
            _leading(vectors),
            _address(values),
            _address(work),
            _int(-1 if query else len(work)),
            _address(integers),
            _int(-1 if query else len(integers)),
            ctypes.byref(info),
        )

    _with_workspace(call)
    if _success(info):
        raise LinAlgError(f"dsyevd did not converge on a matrix of size {size}")
    return vectors


def _with_workspace(call) -> None:
    """``call`` with no workspace, which asks for its size, and with that."""
    work, integers = np.zeros(1), np.zeros(1, _NUMPY_INTEGER)
    call(work, integers, True)
    count = int(integers.view(np.int32)[0]) if sys.byteorder == "little" else int(integers[0])
    call(np.empty(max(1, int(work[0]))), np.zeros(max(1, count), _NUMPY_INTEGER), False)
