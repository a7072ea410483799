"""Shared by the suites: implementations that take turns, and checks before any timing.

pytest-benchmark times one test after the other; a machine that slows down in between would favour those that
ran first. Each test is therefore one round of one implementation, the round number is the outer parameter,
and `bench.results` pairs the rounds. A round is a line in the journal as soon as its test has passed.
"""

import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MICA_CACHE"] = "0"  # solve, not look up

from transformers.utils import logging

from bench.measure import clocks
from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.measure.memory import peak_growth
from bench.results import journal
from bench.results.names import DEVICE_TIME, GRAPH, WALL
from bench.suites.harness import leave_if_crashed, refuse, sentence, why_refused

pytest_plugins = ["bench.measure.watching"]
logging.set_verbosity_error()
logging.disable_progress_bar()

gc.freeze()  # what is imported by now: a capture collects garbage, and would traverse it each time
STREAM = torch.cuda.Stream() if DEVICE == "cuda" else None


class Once:
    """Times one sample: a round of one implementation, the mean of ``iterations`` calls after an untimed one.

    The untimed call pays for what the implementation before has left: its data in the caches, its memory.
    ``axes``: which work it is; ``facts``: what was counted or measured in addition to the time.
    ``make``: of what a call uses up, one for each of the two calls, not timed.
    ``all_clocks``: on an accelerator also its device time and a replay of its graph, each a separate cell.
    """

    graphs: dict[tuple[str, str], Callable] = {}  # noqa: RUF012 (of the cell that is being timed)

    def __init__(self, benchmark):
        self.benchmark = benchmark
        self.cell = self.implementation = self.grown = None
        self.samples: list[dict] = []

    def __call__(self, function, group, name, axes, iterations=1, make=None, all_clocks=False, **facts):
        self.cell, self.implementation = group, name
        self.benchmark.group = group
        self.benchmark.extra_info.update(implementation=name, axes=axes)
        journal.write("doing", group=group, implementation=name)
        call = function if make is None else partial(function, make())
        call()
        if make is not None:
            call = None  # PEFT's models hold themselves in circles
            gc.collect()
            call = partial(function, make())
        with peak_growth() as growth:
            call = clocks.wall(call, iterations)
            result = self.benchmark.pedantic(call, rounds=1, iterations=iterations)
        self.grown = growth()
        self._add(self.benchmark.stats.stats.median, axes, facts, WALL)
        if all_clocks and ON_ACCELERATOR:
            self._add_clock(DEVICE_TIME, lambda: clocks.device_seconds(function), axes)
            self._add_clock(GRAPH, lambda: clocks.device_seconds(self._graph(function)), axes)
        return result

    def note(self, **facts):
        """Facts that are known only after the timing."""
        for sample in self.samples[:1]:
            sample["facts"] |= facts

    def note_growth(self, **unit: float):
        """By how much memory grew at its peak, under this name, in a unit of so many bytes."""
        if self.grown is not None:
            self.note(**{name: self.grown / size for name, size in unit.items()})

    def _add(self, seconds: float, axes: dict, facts: dict, clock: str) -> None:
        group = self.cell
        if ON_ACCELERATOR:
            group, axes = f"{group}, {clock}", {**axes, "clock": clock}
        sample = {"cell": self.cell, "group": group, "axes": axes, "implementation": self.implementation}
        self.samples.append({**sample, "seconds": seconds, "facts": facts})

    def _add_clock(self, clock: str, measure: Callable[[], float], axes: dict) -> None:
        """One that cannot be timed by this clock has no such number, and keeps the others."""
        group = f"{self.cell}, {clock}"
        if why_refused(group, self.implementation):
            return
        try:
            self._add(measure(), axes, {}, clock)
        except Exception as error:
            refuse(group, sentence(error), self.implementation)
            leave_if_crashed()

    def _graph(self, function) -> Callable:
        """The replay of its graph, captured once per cell."""
        if not any(cell == self.cell for cell, _ in self.graphs):
            self.graphs.clear()
        key = self.cell, self.implementation
        if key not in self.graphs:
            self.graphs[key] = clocks.captured(function), function  # keeps its operands alive
        return self.graphs[key][0]


@pytest.fixture
def once(request, benchmark):
    request.node.once = Once(benchmark)
    return request.node.once


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A round counts once its test has passed; an implementation whose test failed has no number."""
    report = yield
    once = getattr(item, "once", None)
    if once is not None and call.when == "call":
        for sample in once.samples if report.passed else ():
            journal.write("sample", **sample)
        if report.failed and once.cell is not None:
            refuse(once.cell, sentence(call.excinfo.value), once.implementation)
            leave_if_crashed()
    return report


@pytest.fixture(autouse=True)
def one_stream():
    """Not the default one, on which nothing can be captured; a backward runs on its forward's stream."""
    with torch.cuda.stream(STREAM) if STREAM is not None else nullcontext():
        yield


@pytest.fixture(scope="module", autouse=True)
def released(request):
    """A suite leaves neither models nor a fragmented heap, which would slow down the next one."""
    yield
    Once.graphs.clear()
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's: freed memory goes back to the system
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def gated():
    """``gated(group, check, implementation)``: what ``check()`` returns; fails if either is refused.

    Once ``check()`` has raised, the cell is refused for good; `harness.build_all` refuses single
    implementations.
    """

    def gated(group: str, check: Callable[[], object], implementation: str = "") -> object:
        checked = None
        if why_refused(group, implementation) is None:
            journal.write("doing", group=group)
            try:
                checked = check()
            except Exception as error:
                refuse(group, sentence(error))
                leave_if_crashed()
        if why := why_refused(group, implementation):
            pytest.fail(f"no number for {group}, {implementation}: {why}", pytrace=False)
        return checked

    return gated
