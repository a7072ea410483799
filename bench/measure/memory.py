"""Memory: what a forward saves for its backward, and how much a process grows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from bench.measure.machine import DEVICE


def alive_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that ``forward()`` leaves allocated, for its result and its graph, as PyTorch counts them.

    The call before is not counted: it may fill caches.
    """
    forward()
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        result = forward()
        return torch.cuda.memory_allocated() - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = forward()
    grown = sum(event.self_cpu_memory_usage for event in profiler.events())
    del result  # alive until here
    return grown


@contextmanager
def peak_growth() -> Iterator[Callable[[], float | None]]:
    """Yields a function that afterwards returns by how many bytes memory grew at its peak inside.

    Of the device's allocator on CUDA, of the process's resident memory on Linux, None elsewhere. Resident is
    also what was freed and is kept for the next call: it is given back first, and the call pays for it.
    """
    if DEVICE == "cpu" and not Path("/proc/self/clear_refs").exists():
        yield lambda: None
        return
    if DEVICE == "cpu":
        give_back()
    before = _peak(reset=True)
    yield lambda: max(0, after - before)
    after = _peak()


def give_back() -> None:
    """Give freed memory back to the system, where the C library is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _peak(reset: bool = False) -> int:
    """Peak use since the last reset; directly after a reset, the current use."""
    if DEVICE == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
