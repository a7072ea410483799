"""Targets of the kernels on a GPU, and whether a run met them: by device time, the median of its rounds.

One layer of a large model stands for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.report.cells import facts, ratio
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
        met = value <= self.limit if self.at_most else value >= self.limit
        return [
            self.what,
            limit,
            str(self.measured) if is_ratio else f"{value:.3f}",
            "yes" if met else "**NO**",
        ]


def targets(result: Result) -> list[Target]:
    """Of a result with the sums of forward and backward."""
    return [*_times(result), *_bandwidths(result), *_errors(result)]


def share_of_copy(result: Result, group: Group, name: str) -> Ratio | None:
    """A kernel's bandwidth ÷ that of a copy."""
    times = ratio(group, names.COPY, name)
    ours, copied = (facts(result, group, one).get("bytes") for one in (name, names.COPY))
    if times is None or ours is None:
        return None
    return Ratio(*(one * ours / (copied or ours) for one in times))  # the copy moves as many unless noted


def _timed(result: Result, **axes: str | int) -> Iterator[Group]:
    return result.select(**axes, clock=names.DEVICE_TIME)


def _times(result: Result) -> Iterator[Target]:
    nothing = Group("", {})
    for part, limit in OVERHEADS:
        what = f"a layer, {part}: % that {names.FAST} adds to the {names.BARE}"
        over = ratio(next(_timed(result, **LAYER, **{"pass": part}), nothing), names.FAST, names.BARE)
        yield Target(what, True, limit, over and Ratio(*(100 * (value - 1) for value in over)))
    layer = next(_timed(result, **LAYER, **{"pass": names.BOTH}), nothing)
    for name, limit in SPEEDUPS:
        what = f"a layer, {names.BOTH}: {name} ÷ {names.FAST}"
        yield Target(what, False, limit, ratio(layer, name, names.FAST))


def _bandwidths(result: Result) -> Iterator[Target]:
    """The slowest cell of each kernel, in its default configuration, which is the first one."""
    for kernel in KERNELS:
        shares = []
        for group in _timed(result, suite="kernels"):
            name = next((one for one in group.timings if one not in (names.COPY, names.CUBLAS)), None)
            if group.axes["kernel"] == kernel and name and int(group.axes["tokens"]) >= TOKENS:
                shares.append((share_of_copy(result, group, name), f"{group.name}, {name}"))
        share, where = min((one for one in shares if one[0]), default=(None, f"from {TOKENS} tokens"))
        yield Target(f"{kernel}: bandwidth ÷ that of a copy; {where}", False, SHARE, share)


def _errors(result: Result) -> Iterator[Target]:
    layer = next(_timed(result, **LAYER, **{"pass": names.BOTH}), None)
    for what in ("y", "dx", "dA"):
        ours, stock = (
            facts(result, layer, name).get(f"error of {what}") if layer else None
            for name in (names.FAST, names.STOCK)
        )
        measured = None if None in (ours, stock) else ours / stock
        yield Target(f"a layer: error of {what} ÷ that of {names.STOCK}", True, ERROR, measured)
