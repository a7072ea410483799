"""What a run leaves behind: one JSON file, and the numbers that follow from it.

Each implementation in a group has a list of seconds, one per round. A ratio is always taken within a round,
in which the implementations took turns: a machine that slows down slows both.

The file is pytest-benchmark's (`bench.results.benchmarks`), so that ``pytest-benchmark compare`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import comb, exp, inf, log
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from scipy.special import stdtrit  # quantiles of Student's t

from bench.results import benchmarks, throughput
from bench.results.names import BACKWARD, BARE, BOTH, FORWARD


class Ratio(NamedTuple):
    """The median over the rounds and its confidence interval (see `interval`)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.high == inf:
            return f"{self.median:.3f} (one round)"
        digits = 2 if abs(self.median) < 100 else 0
        return f"{self.median:.{digits + 1}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"

    def overlaps(self, other: Ratio) -> bool:
        return self.low <= other.high and other.low <= self.high


def interval(values: list[float]) -> Ratio:
    """Median and a confidence interval of at least 95 %.

    By order statistics: the k-th smallest and k-th largest enclose the true median unless fewer than k values
    lie on one side of it, whatever the distribution. With fewer than 6 values even the range holds it with
    less than 95 %; then Student's interval, of the logarithms where all are positive, and at least the range.
    One value has no interval: from 0 to infinity.
    """
    ordered, n = sorted(values), len(values)
    if n == 1:
        return Ratio(ordered[0], 0.0, inf)
    if n < 6:
        return _students(ordered)
    k = 1
    while 2 * sum(comb(n, below) for below in range(k + 1)) <= 0.05 * 2**n:
        k += 1
    return Ratio(median(ordered), ordered[k - 1], ordered[n - k])


def _students(ordered: list[float]) -> Ratio:
    positive = ordered[0] > 0
    numbers = [log(value) for value in ordered] if positive else ordered
    reach = stdtrit(len(numbers) - 1, 0.975) * stdev(numbers) / len(numbers) ** 0.5
    ends = mean(numbers) - reach, mean(numbers) + reach
    low, high = map(exp, ends) if positive else ends
    return Ratio(median(ordered), min(low, ordered[0]), max(high, ordered[-1]))


@dataclass
class Timing:
    """Seconds of every round, what was counted or measured in addition, and the work of one call."""

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)  # see `bench.results.throughput`

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def throughput(self) -> dict[str, float]:
        """Unit -> value, at the median of the rounds."""
        return throughput.per_second(self.work, self.median)


@dataclass
class Group:
    """Implementations that did the same work in turns. ``axes``: its suite, tokens, rank, dtype, …"""

    name: str
    axes: dict[str, str | int]
    timings: dict[str, Timing] = field(default_factory=dict)

    def ratio(self, name: str, baseline: str) -> Ratio:
        """Of the implementations of these names."""
        pairs = zip(self.timings[name].seconds, self.timings[baseline].seconds, strict=True)
        return interval([a / b for a, b in pairs])

    def overhead(self, name: str, baseline: str, bare: str = BARE) -> Ratio | None:
        """(implementation - bare) in each round ÷ median of (baseline - bare); None if that is not positive.

        The divisor is a median: a round in which the baseline happens to be hardly slower than the bare model
        would blow up a quotient taken within it.
        """
        extra, unit = (
            [a - b for a, b in zip(self.timings[one].seconds, self.timings[bare].seconds, strict=True)]
            for one in (name, baseline)
        )
        if median(unit) <= 0:
            return None
        return interval([value / median(unit) for value in extra])


def is_refused(refusal: dict[str, str | None], group: str, name: str) -> bool:
    """Of this implementation, or all of them, in this group, or all whose names begin with that refused."""
    is_of_group = f"{group}, ".startswith(f"{refusal['group']}, ")
    return is_of_group and refusal.get("implementation") in (None, name)


@dataclass
class Result:
    """One run.

    ``refused``: cells, or implementations in them, that have no number, and why. ``checks``: what was tested
    in addition to the times: name, outcome, why. ``stages``: of a run on an accelerator, one summary each.
    """

    machine: dict[str, str | int | bool]
    groups: list[Group]
    refused: list[dict[str, str]] = field(default_factory=list)
    checks: list[dict[str, str]] = field(default_factory=list)
    stages: list[dict] = field(default_factory=list)

    def select(self, **axes: str | int) -> Iterator[Group]:
        """The groups whose axes have these values."""
        for group in self.groups:
            if all(group.axes.get(name) == value for name, value in axes.items()):
                yield group

    @classmethod
    def load(cls, path: Path) -> Result:
        """From a file that `save` wrote, or a run of the suites with pytest-benchmark's ``--benchmark-json``.

        Files of runs before November 28th 2026, which have "groups" of their own, are read too.
        """
        raw = json.loads(path.read_text(encoding="utf-8"))
        if "groups" in raw:
            return cls._of_groups(raw)
        result = cls(benchmarks.machine(raw), [], **benchmarks.records(raw))
        groups: dict[str, Group] = {}
        for entry in raw["benchmarks"]:
            info = entry["extra_info"]
            group = groups.setdefault(entry["group"], Group(entry["group"], info["axes"]))
            timing = Timing(entry["stats"]["data"], info["facts"], info["work"])
            group.timings[info["implementation"]] = timing
        result.groups.extend(groups.values())
        return result

    @classmethod
    def _of_groups(cls, raw: dict) -> Result:
        groups = []
        for one in raw["groups"]:
            group = Group(one["name"], one["axes"])
            for name, timing in one["timings"].items():
                group.timings[name] = Timing(**timing, work=throughput.of_axes(group.axes))
            groups.append(group)
        return cls(raw["machine"], groups, raw["refused"], raw.get("checks", []), raw.get("stages", []))

    def save(self, path: Path) -> None:
        """As JSON, a line for each benchmark and each other record; the file is complete at every moment."""
        scratch = path.with_suffix(".part")
        scratch.write_text(benchmarks.document(self), encoding="utf-8")
        scratch.replace(path)

    def with_both(self) -> Result:
        """With the sums of forward and backward within a round, where both were timed and the sum was not."""
        groups = [*self.groups]
        for forward in self.select(**{"pass": FORWARD}):
            axes, summed = ({**forward.axes, "pass": which} for which in (BACKWARD, BOTH))
            for backward in self.select(**axes) if not any(self.select(**summed)) else ():
                both = Group(forward.name.replace(FORWARD, BOTH), summed)
                for name in (one for one in forward.timings if one in backward.timings):
                    # in an interrupted run one may have one round more
                    first, second = forward.timings[name], backward.timings[name]
                    pairs = zip(first.seconds, second.seconds, strict=False)
                    both.timings[name] = Timing([a + b for a, b in pairs], {**first.facts}, {**first.work})
                groups += [both] if both.timings else []
        return Result(self.machine, groups, self.refused, self.checks, self.stages)
