"""Targets of the kernels on a GPU, and whether a run met them: by device time, the median of its rounds.

One layer of a large model stands for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.schema import Result

LAYER = {"suite": "layer", "tokens": 8192, "out": 4096, "in": 4096, "rank": 16, "dtype": "bfloat16"}
# (pass, per cent of the bare model's time that it may add)
OVERHEADS = ((names.FORWARD, 28), (names.BACKWARD, 35))
# (baseline, its time ÷ ours at least)
SPEEDUPS = ((names.STOCK_16, 1.15), (names.STOCK, 1.6), (names.ATEN, 0.98), (names.COMPILED, 0.98))
# Memory-bound kernels, and the share of a copy's bandwidth that each must reach, from TOKENS tokens
KERNELS, SHARE, TOKENS = (names.DOWN_A, names.DOWN_B, names.UP_B, names.GRAD_A), 0.8, 4096
ERROR = 1.1  # relative errors ÷ those of stock PEFT at most


class Target(NamedTuple):
    """``measured`` must be at most or at least ``limit``; None: it has no number."""

    what: str
    at_most: bool
    limit: float
    measured: Ratio | float | None

    @property
    def row(self) -> list[str]:
        """What, target, measured, met."""
        limit = f"{'≤' if self.at_most else '≥'} {self.limit:g}"
        if self.measured is None:
            return [self.what, limit, "", "not measured"]
        is_ratio = isinstance(self.measured, Ratio)
        value = self.measured.median if is_ratio else self.measured
        shown = str(self.measured) if is_ratio else f"{value:.3f}"
        met = value <= self.limit if self.at_most else value >= self.limit
        return [self.what, limit, shown, "yes" if met else "**NO**"]


def targets(result: Result) -> list[Target]:
    """Of a result with the sums of forward and backward."""
    return [*_times(result), *_bandwidths(result), *_errors(result)]


def _layer(result: Result, part: str, clock: str = names.DEVICE_TIME) -> Group:
    """The one that stands for the others; without an implementation if the run does not have it."""
    return next(result.select(**LAYER, **{"pass": part}, clock=clock), Group("", {}))


def _ratio(group: Group, name: str, baseline: str) -> Ratio | None:
    return group.ratio(name, baseline) if {name, baseline} <= group.timings.keys() else None


def _times(result: Result) -> Iterator[Target]:
    for part, limit in OVERHEADS:
        what = f"a layer, {part}: % that {names.FAST} adds to the {names.BARE}"
        over = _ratio(_layer(result, part), names.FAST, names.BARE)
        yield Target(what, True, limit, over and Ratio(*(100 * (value - 1) for value in over)))
    for name, limit in SPEEDUPS:
        what = f"a layer, {names.BOTH}: {name} ÷ {names.FAST}"
        yield Target(what, False, limit, _ratio(_layer(result, names.BOTH), name, names.FAST))


def _bandwidths(result: Result) -> Iterator[Target]:
    """The slowest cell of each kernel, in its default configuration, which is the first one.

    A copy moves as many bytes, so the quotient of times is that of bandwidths.
    """
    for kernel in KERNELS:
        shares = []
        for group in result.select(suite="kernels", kernel=kernel, clock=names.DEVICE_TIME):
            name = next((one for one in group.timings if one not in (names.COPY, names.CUBLAS)), "")
            share = _ratio(group, names.COPY, name)
            if share and int(group.axes["tokens"]) >= TOKENS:
                shares.append((share, f"{group.name}, {name}"))
        slowest, where = min(shares, default=(None, f"from {TOKENS} tokens"))
        yield Target(f"{kernel}: bandwidth ÷ that of a copy; {where}", False, SHARE, slowest)


def _errors(result: Result) -> Iterator[Target]:
    timings = _layer(result, names.BOTH, names.WALL).timings  # whose cell has the facts
    for what in ("y", "dx", "dA"):
        ours, stock = (
            timings[name].facts.get(f"error of {what}") if name in timings else None
            for name in (names.FAST, names.STOCK)
        )
        measured = None if None in (ours, stock) else ours / stock
        yield Target(f"a layer: error of {what} ÷ that of {names.STOCK}", True, ERROR, measured)
