"""How many threads PyTorch and BLAS have while something is solved, and that they have their own again later.

BLAS's count is that of the whole process, and several threads may solve at once: if each saved and restored
it, one would sooner or later restore what another had set temporarily. So the first to enter saves it, all
that are inside share the smallest count that any of them requests, and the last to leave restores it.

PyTorch's count (OpenMP's) is each thread's own, but ``torch.set_num_threads`` also sets what threads that
have not used theirs yet begin with, permanently.

``run`` gives many small matrices one thread each, instead of all threads to one after another. Up to about
n = 1000 a partial eigenproblem spends its time in short loops whose threads wait for each other, and SciPy's
BLAS and PyTorch's each have their own pool. With one thread per matrix nothing waits, not for the interpreter
either (``lapack``): the 210 layers of SmolLM2-135M take 5.2 s on one core and 2.9 s on two.
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

from mica.subspace import lapack  # noqa: F401  (SciPy's library has to be loaded before the next line)

# min(out_features, in_features) up to which a matrix gets one thread.
SMALL = 1024

# At once: each holds an (n, n) fp64 matrix, a block of rows (8 MiB both at most) and one of the buffers of
# OpenBLAS, of which there is a fixed number.
MOST_WORKERS = 32

Item = TypeVar("Item")
Result = TypeVar("Result")

# Looking for the loaded libraries takes milliseconds. OpenBLAS built on OpenMP has one count per thread.
_blas = ThreadpoolController().select(user_api="blas").lib_controllers
_own = [library for library in _blas if getattr(library, "threading_layer", None) == "openmp"]
_shared = [library for library in _blas if library not in _own]

_lock = threading.Lock()
_requested: list[int] = []  # by all that are within ``blas_threads`` now
_before: list[int] = []  # of each of ``_shared``, when none was
_here = threading.local()


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """At most ``count`` threads for BLAS; fewer while another thread requests fewer."""
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
    for library, before in zip(_shared, _before, strict=True):
        count = min(_requested, default=before)
        if library.num_threads != count:
            # threadpoolctl 3.8 lets only the first thread that sets OpenBLAS's count do so, until that one
            # releases it. Here every thread may set it, and elsewhere afterwards.
            release = getattr(library, "clear_controlling_thread", lambda force: None)
            release(force=True)
            library.set_num_threads(count)
            release(force=True)


def _setters():
    """The functions behind ``torch.set_num_threads`` that set a thread's own count: OpenMP's and MKL's."""
    try:
        linked = ctypes.CDLL(torch._C.__file__)  # looks into what PyTorch is linked with, too
        openmp = linked.omp_set_num_threads
    except (AttributeError, OSError):  # on Windows; then new threads begin with the last count that was set
        return [torch.set_num_threads]
    return [openmp, *filter(None, [getattr(linked, "MKL_Set_Num_Threads_Local", None)])]


_set_own = _setters()


def set_torch_threads(count: int) -> int:
    """``torch.set_num_threads`` for this thread and no other, those to come included; what it was before."""
    before = torch.get_num_threads()  # at its first call PyTorch sets the thread's count
    if count != before:
        for set_own in _set_own:
            set_own(count)
    return before


@contextmanager
def one_pool() -> Iterator[None]:
    """As many threads as PyTorch has, all of them BLAS's; within itself it changes nothing.

    PyTorch's threads and BLAS's wait by spinning and would compete for the cores (measured: 7 ms
    lost at every change from one to the other).
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


def is_small(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and min(weight.shape) <= SMALL


def run(
    function: Callable[[Item], Result], items: Sequence[Item], small: Callable[[Item], bool]
) -> Iterator[tuple[Item, Result]]:
    """Every item and what ``function`` returns for it, when it is done; the small ones in parallel first.

    The first exception ends it: what has not begun is cancelled, what runs is waited for. The thread counts
    of the caller are as before, afterwards.
    """
    parallel = [item for item in items if small(item)]
    rest = [item for item in items if not small(item)]
    workers = min(torch.get_num_threads(), len(parallel), MOST_WORKERS)
    if workers > 1:
        with (
            blas_threads(1),
            ThreadPoolExecutor(workers, "mica-subspace", set_torch_threads, (1,)) as pool,
        ):
            futures = {pool.submit(function, item): item for item in parallel}
            try:
                for future in as_completed(futures):
                    yield futures.pop(future), future.result()  # and keep no result
            finally:
                pool.shutdown(cancel_futures=True)
    else:
        rest = parallel + rest
    for item in rest:
        yield item, function(item)
