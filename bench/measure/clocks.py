"""How a call is timed. On a CPU by the CPU time of the process, of which PyTorch has one thread, with the
wall clock beside it: what other processes do changes the former little. On an accelerator by three clocks:

- *wall clock*: calls back to back, one synchronisation at the end: the longer of host and device time.
- *device time*: between two events around one call, with the host far ahead and no operand in the L2 cache.
  Excludes host time, but includes a gap of a microsecond or two between launches.
- *graph replay*: the same for a captured CUDA graph of the call, without those gaps.

`triton.testing` has clocks for the last two, which measure something else:

- `do_bench` also has an event on either side of each call and an empty cache, but it empties the cache by
  zeroing 256 MB, whose dirty lines are written back while the call is timed. And that zeroing is all the lead
  that the host gets: a call that takes the host longer to enqueue than it takes the device is timed by the
  host's clock. Here the cache is emptied by reading, and the device sleeps while the host enqueues.
- `do_bench_cudagraph` captures many calls in one graph and never empties the cache, so a layer's operands are
  in it from the second call on; here a graph is one call, and the cache is empty before each replay. And it
  captures on a new stream, while a backward runs on that of its forward, which is not being captured.

A dry run has none of these clocks; the host's stands in for all of them, and its times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from bench.measure.machine import IS_DRY

Call = Callable[[], object]

FLUSH_BYTES = 256 * 2**20  # five times the L2 cache of an H100
# Per round: fewest and most calls, and about how long
FEWEST = 3
MOST = 9
SECONDS = 0.005
# The device waits while the host enqueues a call: LEAD times what that took before, and a little more.
LEAD = 3.0
LEAST_LEAD = 50e-6
LONGEST_LEAD = 20e-3
CLOCK_RATE = 2.0e9  # cycles a second of `_sleep`; a slower clock only lengthens the lead

_flush: torch.Tensor | None = None


class HostTooSlowError(RuntimeError):
    """The device waited for the host inside a call: its events hold the host's time."""


class Sample(NamedTuple):
    """Seconds of a call, the mean of several back to back, and what the last of them returned."""

    cpu: float
    wall: float
    result: object


def sample(call: Call, calls: int) -> Sample:
    """The device is waited for before the first call and after the last one."""
    _wait()
    wall = time.perf_counter()
    cpu = time.process_time()
    for _ in range(calls):
        result = call()
    _wait()
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    return Sample(cpu / calls, wall / calls, result)


def seconds(call: Call) -> float:
    """How long one call takes: roughly, to choose how many make a sample."""
    return sample(call, 1).wall


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_seconds(call: Call) -> float:
    """The median over some calls of the time between two events."""
    if IS_DRY:
        return _host_seconds(call)
    torch.cuda.synchronize()
    lead = LEAST_LEAD + LEAD * _host_seconds(call)
    while True:
        spans, is_late = _device_spans(call, min(lead, LONGEST_LEAD))
        if not is_late:
            return median(spans)
        if lead >= LONGEST_LEAD:
            raise HostTooSlowError(f"the host takes {lead * 1e3:.0f} ms or more for a call, or waits in it.")
        lead *= 2


def _device_spans(call: Call, lead: float) -> tuple[list[float], bool]:
    """Seconds of some calls, and whether the host ever took longer than the device waited for it."""
    events = []
    is_late = False
    until = time.perf_counter() + SECONDS
    while len(events) < FEWEST or (len(events) < MOST and time.perf_counter() < until):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        _empty_cache()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(lead * CLOCK_RATE))
        before = time.perf_counter()
        start.record()
        call()
        end.record()
        is_late |= time.perf_counter() - before > 0.8 * lead
        end.synchronize()
        events.append((start, end))
    return [1e-3 * start.elapsed_time(end) for start, end in events], is_late


def _empty_cache() -> None:
    """Read what fills the L2 cache: written lines would be written back while the next call is timed."""
    global _flush
    if _flush is None:
        _flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    torch.max(_flush)


def captured(call: Call) -> Call:
    """A replay of ``call`` as a CUDA graph, captured on the current stream, which is not the default one.

    Raises:
        RuntimeError: PyTorch's, for a call that cannot be captured.
    """
    if IS_DRY:
        return call
    for _ in range(2):  # what is set up once is set up before
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def _host_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
