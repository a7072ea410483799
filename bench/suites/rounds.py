"""Rounds of a cell, in which its implementations take turns, and one sample of one of them by every clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from itertools import count

import pytest

from bench.measure import clocks
from bench.measure.machine import IS_CPU_TIME, IS_DRY, ON_ACCELERATOR
from bench.measure.memory import peak_growth
from bench.results import journal, throughput
from bench.results.cell import Group
from bench.results.names import DEVICE_TIME, GRAPH, STOCK, WALL
from bench.suites.harness import leave_if_crashed, pick, refuse, sentence, why_refused

# After so many rounds it is seen whether the ratios are known well enough. Who looks after every round stops
# where a few agree by chance: tests/bench/suites/test_rounds.py simulates how often intervals hold the truth.
LOOKS = (8, 16, 32, 64)
FEWEST = pick(default=3, cuda=6, dry=1)  # rounds, however long they take
SECONDS = pick(default=20.0, cuda=1.0, dry=0.0)  # that a cell may take, unless it names its own
LONG = 0.5  # seconds of a call before which only one untimed call is made, not one in each round


class Once:
    """Times one sample of one implementation: the mean of ``iterations`` calls after an untimed one.

    The untimed call pays for what the implementation before has left: its data in the caches, its memory.
    ``axes``: which work it is; ``facts``: what was counted or measured in addition to the time.
    ``work``: how much of it one call does (`bench.results.throughput`); by default the tokens of ``axes``.
    ``make``: makes what a call uses up, one for each call, not timed.
    ``warm_up``: instead of the untimed call, where one takes too long.
    ``peak``: whether to measure by how much memory grows, for `note_growth`; on a CPU that costs time.
    ``all_clocks``: on an accelerator also its device time and a replay of its graph, each a separate cell.
    """

    # (cell, implementation) -> the replay of its graph, and the call, which keeps its operands alive
    graphs: dict[tuple[str, str], tuple[Callable, Callable]] = {}  # noqa: RUF012
    long: set[tuple[str, str]] = set()  # noqa: RUF012 - (cell, implementation) whose calls are long

    def __init__(self, cell: str, implementation: str):
        self.cell = cell
        self.implementation = implementation
        self.grown: float | None = None
        self.work: dict[str, float] = {}
        self.samples: list[dict] = []

    def __call__(
        self,
        function,
        axes,
        iterations=1,
        make=None,
        all_clocks=False,
        work=None,
        warm_up=None,
        peak=ON_ACCELERATOR,
        **facts,
    ):
        self.work = throughput.of_axes(axes) if work is None else work
        call = self._warmed_up(function, make, warm_up)
        with peak_growth() if peak else nullcontext(lambda: None) as growth:
            timed = clocks.sample(call, iterations)
        self.grown = growth()
        if timed.wall > LONG:
            self.long.add((self.cell, self.implementation))
        if not ON_ACCELERATOR:
            if IS_CPU_TIME:
                self.add(timed.cpu, axes, facts, wall=timed.wall)
            else:
                self.add(timed.wall, axes, facts)
            return timed.result
        self._add_clock(WALL, lambda: timed.wall, axes, facts)
        if all_clocks:
            self._add_clock(DEVICE_TIME, lambda: clocks.device_seconds(function), axes, {})
            self._add_clock(GRAPH, lambda: clocks.device_seconds(self._graph(function)), axes, {})
        return timed.result

    def note(self, **facts):
        """Facts that are known only after the timing."""
        self.samples[0]["facts"] |= facts

    def note_work(self, work: dict[str, float]):
        """The work of one call, where only its result tells it."""
        for sample in self.samples:
            sample["work"] = work

    def note_growth(self, name: str, unit: float):
        """By how much memory grew at its peak, under this name, in a unit of so many bytes."""
        if self.grown is not None:
            self.note(**{name: self.grown / unit})

    def _warmed_up(self, function, make: Callable | None, warm_up: Callable | None) -> Callable:
        """What is timed, after an untimed call, or what stands in for it."""
        if warm_up is not None:
            warm_up()
            return function
        is_warm = (self.cell, self.implementation) in self.long
        if make is None:
            if not is_warm:
                function()
            return function
        if not is_warm:
            function(make())
        gc.collect()  # PEFT's models hold themselves in circles
        return partial(function, make())

    def add(self, seconds: float, axes: dict, facts: dict, clock: str = "", **more) -> None:
        self.samples.append(
            {
                "cell": self.cell,
                "group": f"{self.cell}, {clock}" if clock else self.cell,
                "axes": {**axes, "clock": clock} if clock else axes,
                "implementation": self.implementation,
                "seconds": seconds,
                "facts": facts,
                "work": self.work,
                **more,
            }
        )

    def _add_clock(self, clock: str, measure: Callable[[], float], axes: dict, facts: dict) -> None:
        """One that cannot be timed by this clock has no such number, and keeps the others."""
        group = f"{self.cell}, {clock}"
        if why_refused(group, self.implementation):
            return
        try:
            self.add(measure(), axes, facts, clock)
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


Sample = Callable[[Once, str], None]  # takes one sample of an implementation


def prepared(group: str, check: Callable[[], object]) -> object:
    """What ``check()`` returns; a cell for which it raises is refused, and its test fails."""
    if why_refused(group, "") is None:
        journal.write("doing", group=group)
        try:
            return check()
        except Exception as error:
            refuse(group, sentence(error))
            leave_if_crashed()
    pytest.fail(f"no number for {group}: {why_refused(group, '')}", pytrace=False)


def rounds(
    group: str, names: Iterable[str], sample: Sample, seconds: float = SECONDS, fewest: int = FEWEST
) -> None:
    """Time the implementations in turns until every ratio of their times is known to ±5 %, or time is up.

    ``sample(once, name)`` takes one sample of one; one that raises has no number, and the others continue.
    ``seconds``: for all rounds; `fewest` rounds are made whatever they take, and one at least.

    Raises:
        pytest.fail.Exception: an implementation has no number.
    """
    groups: dict[str, Group] = {}
    began = time.monotonic()
    for number in count(1):
        before = time.monotonic()
        samples = _round(group, names, sample)
        for one in samples:
            journal.write("sample", **one)
            journal.add_sample(groups, one)
        now = time.monotonic()
        is_late = number >= fewest and 2 * now - before - began > seconds
        if not samples or IS_DRY or is_late or number == LOOKS[-1]:
            break
        if number in LOOKS and all(map(_is_narrow, groups.values())):
            break
    whys = [f"{name}: {why}" for name in names if (why := why_refused(group, name)) is not None]
    if whys:
        pytest.fail(f"no number for {group}, {'; '.join(whys)}", pytrace=False)


def _round(group: str, names: Iterable[str], sample: Sample) -> list[dict]:
    """One sample of each implementation that has not been refused; written only as a whole."""
    samples = []
    for name in names:
        if why_refused(group, name) is not None:
            continue
        journal.write("doing", group=group, implementation=name)
        once = Once(group, name)
        try:
            sample(once, name)
        except Exception as error:
            refuse(group, sentence(error), name)
            leave_if_crashed()
        else:
            samples += once.samples
    return samples


def _is_narrow(group: Group) -> bool:
    """Whether the ratios of all implementations that are left are known to ±5 %."""
    left = [name for name in group.timings if why_refused(group.name, name) is None]
    if not left:
        return True
    baseline = STOCK if STOCK in left else left[0]
    return all(group.ratio(name, baseline).is_narrow for name in left)
