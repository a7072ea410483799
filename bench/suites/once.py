"""One sample of one implementation, by every clock that the device has."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

from bench.measure import clocks
from bench.measure.machine import ON_ACCELERATOR
from bench.measure.memory import peak_growth
from bench.results import journal, throughput
from bench.results.names import DEVICE_TIME, GRAPH, WALL
from bench.suites.harness import leave_if_crashed, refuse, sentence, why_refused


class Once:
    """Times one sample: a round of one implementation, the mean of ``iterations`` calls after an untimed one.

    The untimed call pays for what the implementation before has left: its data in the caches, its memory.
    ``axes``: which work it is; ``facts``: what was counted or measured in addition to the time.
    ``work``: how much of it one call does (`bench.results.throughput`); by default the tokens of ``axes``.
    ``make``: of what a call uses up, one for each of the two calls, not timed.
    ``warm_up``: instead of the untimed call, where one takes too long.
    ``all_clocks``: on an accelerator also its device time and a replay of its graph, each a separate cell.
    """

    # (cell, implementation) -> the replay of its graph, and the call, which keeps its operands alive
    graphs: dict[tuple[str, str], tuple[Callable, Callable]] = {}  # noqa: RUF012

    def __init__(self, benchmark):
        self.benchmark = benchmark
        self.cell: str | None = None
        self.implementation: str | None = None
        self.grown: float | None = None
        self.work: dict[str, float] = {}
        self.samples: list[dict] = []

    def __call__(
        self,
        function,
        group,
        name,
        axes,
        iterations=1,
        make=None,
        all_clocks=False,
        work=None,
        warm_up=None,
        **facts,
    ):
        self.cell = group
        self.implementation = name
        self.work = throughput.of_axes(axes) if work is None else work
        self.benchmark.group = group
        self.benchmark.extra_info.update(implementation=name, axes=axes)
        journal.write("doing", group=group, implementation=name)
        call = _warmed_up(function, make, warm_up)
        with peak_growth() as growth:
            result = self.benchmark.pedantic(clocks.wall(call, iterations), rounds=1, iterations=iterations)
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

    def note_work(self, work: dict[str, float]):
        """The work of one call, where only its result tells it."""
        for sample in self.samples:
            sample["work"] = work

    def note_growth(self, **unit: float):
        """By how much memory grew at its peak, under this name, in a unit of so many bytes."""
        if self.grown is not None:
            self.note(**{name: self.grown / size for name, size in unit.items()})

    def _add(self, seconds: float, axes: dict, facts: dict, clock: str) -> None:
        group = self.cell
        if ON_ACCELERATOR:
            group = f"{group}, {clock}"
            axes = {**axes, "clock": clock}
        self.samples.append(
            {
                "cell": self.cell,
                "group": group,
                "axes": axes,
                "implementation": self.implementation,
                "seconds": seconds,
                "facts": facts,
                "work": self.work,
            }
        )

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
        key = (self.cell, self.implementation)
        if key not in self.graphs:
            self.graphs[key] = (clocks.captured(function), function)
        replay, _ = self.graphs[key]
        return replay


def _warmed_up(function, make: Callable | None, warm_up: Callable | None) -> Callable:
    """What is timed, after an untimed call, or what stands in for it."""
    if warm_up is not None:
        warm_up()
        return function
    if make is None:
        function()
        return function
    function(make())
    gc.collect()  # PEFT's models hold themselves in circles
    return partial(function, make())
