"""How many threads PyTorch and BLAS have while something is solved, and that they have their own again later.

BLAS's count is that of the whole process, and several threads may solve at once: if each saved and restored
it, one would sooner or later restore what another had set temporarily. So the first to enter saves it, all
that are inside share the smallest count that any of them requests, and the last to leave restores it.

PyTorch's count (OpenMP's) is each thread's own, but ``torch.set_num_threads`` also sets what threads that
have not used theirs yet begin with, permanently.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController

from mica.subspace import lapack  # noqa: F401  (SciPy's library has to be loaded before the next line)

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
