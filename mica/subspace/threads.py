"""The numbers of threads that PyTorch and BLAS have while something is solved, and are given back afterwards.

BLAS's number is the whole process's, and several threads may solve at once: if each saved and restored it,
one would sooner or later restore what another had set temporarily. So the first to enter saves it, all that
are inside share the smallest number that any of them requests, and the last to leave restores it.

PyTorch's number (OpenMP's) is each thread's own, but ``torch.set_num_threads`` also sets, permanently, what
threads that have not used theirs yet begin with.

``run`` gives each of many small matrices one thread, instead of giving all threads to one matrix after
another. Up to about n = 1000 a partial eigenproblem spends its time in short loops whose threads wait for
each other, and SciPy's BLAS and PyTorch's each have their own pool. With one thread per matrix nothing waits,
not even for the interpreter (``lapack``): the 210 layers of SmolLM2-135M take 5.2 s on one core and 2.9 s on
two.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from mica.subspace import lapack  # noqa: F401  (SciPy's library has to be loaded before the next line)

# min(out_features, in_features) up to which a matrix gets one thread.
SMALL = 1024

# The most matrices at once: each worker holds an (n, n) fp64 matrix and a block of rows, of at most 8 MiB
# each, and one of OpenBLAS's buffers, whose number is fixed.
MOST_WORKERS = 32

Item = TypeVar("Item")
Result = TypeVar("Result")

# Found once, because looking for the loaded libraries takes milliseconds. OpenBLAS on OpenMP has a number of
# threads for each thread that calls it, other builds have one for the process.
_blas = ThreadpoolController().select(user_api="blas").lib_controllers
_own = [library for library in _blas if getattr(library, "threading_layer", None) == "openmp"]
_shared = [library for library in _blas if library not in _own]

_lock = threading.Lock()
_requested: list[int] = []  # the numbers that all threads request that are within ``blas_threads`` now
_before: list[int] = []  # the number of each of ``_shared`` when no thread was within
_here = threading.local()


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """A context with at most ``count`` threads for BLAS; fewer while another thread requests fewer."""
    own = [library.num_threads for library in _own]
    with _lock:
        if not _requested:
            _before[:] = [library.num_threads for library in _shared]
        _requested.append(count)
        _apply()
    try:
        for library in _own:
            library.set_num_threads(count)
        yield
    finally:
        for library, before in zip(_own, own, strict=True):
            library.set_num_threads(before)
        with _lock:
            _requested.remove(count)
            _apply()


def _apply() -> None:
    """Give BLAS the smallest number of threads that is requested now."""
    for library, before in zip(_shared, _before, strict=True):
        count = min(_requested, default=before)
        if library.num_threads != count:
            # threadpoolctl 3.8 lets only the first thread that sets OpenBLAS's number do so, until that one
            # releases it. Here any thread may set it, and so may any other code afterwards.
            release = getattr(library, "clear_controlling_thread", lambda force: None)
            release(force=True)
            library.set_num_threads(count)
            release(force=True)


def _setters():
    """The functions behind ``torch.set_num_threads`` that set a thread's own number: OpenMP's and MKL's."""
    try:
        linked = ctypes.CDLL(torch._C.__file__)  # finds functions of the libraries it is linked with, too
        openmp = linked.omp_set_num_threads
    except (AttributeError, OSError):  # on Windows; then new threads begin with the last number that was set
        return [torch.set_num_threads]
    mkl = getattr(linked, "MKL_Set_Num_Threads_Local", None)
    if mkl is None:
        return [openmp]
    return [openmp, mkl]


_set_own = _setters()


def set_torch_threads(count: int) -> int:
    """``torch.set_num_threads`` for this thread only, not for new ones; returns the number before."""
    before = torch.get_num_threads()  # the first call in a thread sets its number
    if count != before:
        for set_own in _set_own:
            set_own(count)
    return before


@contextmanager
def one_pool() -> Iterator[None]:
    """A context in which BLAS has all of PyTorch's threads and PyTorch has one; nested, it changes nothing.

    Threads of both wait by spinning, and would compete for the cores (measured: 7 ms lost at every change
    from one to the other).
    """
    if getattr(_here, "is_one_pool", False):
        yield
        return
    threads = set_torch_threads(1)
    _here.is_one_pool = True
    try:
        with blas_threads(threads):
            yield
    finally:
        _here.is_one_pool = False
        set_torch_threads(threads)


def is_small(weight: Tensor) -> bool:
    """Whether it is solved by one thread, beside others."""
    return weight.device.type == "cpu" and min(weight.shape) <= SMALL


def run(
    function: Callable[[Item], Result], items: Sequence[Item], small: Callable[[Item], bool]
) -> Iterator[tuple[Item, Result]]:
    """Yields (item, result of ``function``) as results come: the small ones first, in parallel.

    The first exception ends it: calls that have not begun are cancelled, and running ones waited for.
    Afterwards the caller has its own numbers of threads again.

    Args:
        function: The function that is called once with each item.
        items: The items, in any order.
        small: Whether an item is solved by one thread beside others, instead of by all threads alone.
    """
    parallel = [item for item in items if small(item)]
    rest = [item for item in items if not small(item)]
    workers = min(torch.get_num_threads(), len(parallel), MOST_WORKERS)
    if workers <= 1:
        rest = parallel + rest
    else:
        with (
            blas_threads(1),
            ThreadPoolExecutor(workers, "mica-subspace", set_torch_threads, (1,)) as pool,
        ):
            futures = {pool.submit(function, item): item for item in parallel}
            try:
                for future in as_completed(futures):
                    yield futures.pop(future), future.result()  # no result is kept here
            finally:
                pool.shutdown(cancel_futures=True)
    for item in rest:
        yield item, function(item)
