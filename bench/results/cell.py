"""A cell of a run: implementations that did the same work in turns, their seconds, and the ratios of these.

A ratio is always taken within a round, in which the implementations took turns: a machine that slows down
slows both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb, exp, inf, log
from statistics import mean, median, stdev
from typing import NamedTuple

from scipy.special import stdtrit  # quantiles of Student's t

from bench.results import throughput

NARROW = 0.05  # of the median; how far the ends of an interval may be from it


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

    @property
    def is_narrow(self) -> bool:
        return self.low >= (1 - NARROW) * self.median and self.high <= (1 + NARROW) * self.median


def interval(values: list[float]) -> Ratio:
    """Median and a confidence interval of at least 95 %.

    By order statistics: the k-th smallest and k-th largest enclose the true median unless fewer than k values
    lie on one side of it, whatever the distribution. With fewer than 6 values even the range holds it with
    less than 95 %; then Student's interval, of the logarithms where all are positive, and at least the range.
    One value has no interval: from 0 to infinity.
    """
    ordered = sorted(values)
    n = len(ordered)
    if n == 1:
        return Ratio(ordered[0], 0.0, inf)
    if n < 6:
        return _students(ordered)
    k = 1
    while 2 * sum(comb(n, below) for below in range(k + 1)) <= 0.05 * 2**n:
        k += 1
    return Ratio(median(ordered), ordered[k - 1], ordered[n - k])


def _students(ordered: list[float]) -> Ratio:
    is_positive = ordered[0] > 0
    numbers = [log(value) for value in ordered] if is_positive else ordered
    center = mean(numbers)
    reach = stdtrit(len(numbers) - 1, 0.975) * stdev(numbers) / len(numbers) ** 0.5
    low = center - reach
    high = center + reach
    if is_positive:
        low = exp(low)
        high = exp(high)
    return Ratio(median(ordered), min(low, ordered[0]), max(high, ordered[-1]))


@dataclass
class Timing:
    """Seconds of every round, what was counted or measured in addition, and the work of one call.

    ``wall``: the same rounds by the wall clock, where ``seconds`` are CPU time; [] elsewhere.
    """

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)  # see `bench.results.throughput`
    wall: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def throughput(self) -> dict[str, float]:
        """Unit -> value, at the median of the rounds."""
        return throughput.per_second(self.work, self.median)

    @property
    def waiting(self) -> float | None:
        """Wall clock ÷ CPU time, the median of the rounds: 1 where nothing else ran on this core."""
        if not self.wall:
            return None
        return median(wall / cpu for wall, cpu in zip(self.wall, self.seconds, strict=True))


@dataclass
class Group:
    """Implementations that did the same work in turns. ``axes``: its suite, tokens, rank, dtype, …"""

    name: str
    axes: dict[str, str | int]
    timings: dict[str, Timing] = field(default_factory=dict)

    def ratio(self, name: str, baseline: str) -> Ratio:
        """An implementation's time ÷ the baseline's."""
        pairs = zip(self.timings[name].seconds, self.timings[baseline].seconds, strict=True)
        return interval([ours / theirs for ours, theirs in pairs])


def is_refused(refusal: dict[str, str | None], group: str, name: str) -> bool:
    """Whether a refusal is of this implementation, or of all, in this group.

    A group's refusal holds in all groups whose names begin with its name: the passes and clocks of a cell.
    """
    is_of_group = f"{group}, ".startswith(f"{refusal['group']}, ")
    return is_of_group and refusal.get("implementation") in (None, name)
