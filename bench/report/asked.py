"""What is asked of the kernels on a GPU, and whether a run met it: by device time, the median of its rounds.

One layer of a large model stands for the others, and the group of its q, k and v projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.report.cells import facts, ratio
from bench.results import names
from bench.results.schema import Group, Ratio, Result

GROUP = {"suite": "group", "tokens": 8192, "in": 4096, "rank": 16, "dtype": "bfloat16"}
LAYER = {**GROUP, "suite": "layer", "out": 4096}
# (cell, pass, implementation, per cent of the bare model's time that it may add)
EXTRA = (
    (LAYER, names.FORWARD, names.FAST, 28),
    (LAYER, names.BACKWARD, names.FAST, 35),
    (GROUP, names.BOTH, names.GROUPED, 15),
)
# (implementation, its time ÷ ours at least)
AS_FAST = ((names.STOCK_16, 1.15), (names.STOCK, 1.6), (names.ATEN, 0.98), (names.COMPILED, 0.98))
# Those that are bound by bandwidth, and the share of a copy's that they reach at least, with so many tokens
KERNELS, SHARE, TOKENS = (names.DOWN_A, names.DOWN_B, names.UP_B, names.GRAD_A), 0.8, 4096
ERROR = 1.1  # relative errors ÷ those of stock PEFT at most


class Demand(NamedTuple):
    """``limit`` of ``measured``: ``at_most`` that, or else at least. None: it has no number."""

    what: str
    at_most: bool
    limit: float
    measured: Ratio | float | None

    @property
    def row(self) -> list[str]:
        """What, asked, measured, met."""
        asked = f"{'≤' if self.at_most else '≥'} {self.limit:g}"
        if self.measured is None:
            return [self.what, asked, "", "not measured"]
        is_ratio = isinstance(self.measured, Ratio)
        value = self.measured.median if is_ratio else self.measured
        met = value <= self.limit if self.at_most else value >= self.limit
        shown = str(self.measured) if is_ratio else f"{value:.3f}"
        return [self.what, asked, shown, "yes" if met else "**NO**"]


def demands(result: Result) -> list[Demand]:
    """Of a result with the sums of forward and backward."""
    return [*_times(result), *_bandwidths(result), *_errors(result)]


def share_of_copy(result: Result, group: Group, implementation: str) -> Ratio | None:
    """Of a kernel's bandwidth in that of a copy."""
    times = ratio(group, names.COPY, implementation)
    ours, copied = (facts(result, group, name).get("bytes") for name in (implementation, names.COPY))
    if times is None or ours is None:
        return None
    return Ratio(*(one * ours / (copied or ours) for one in times))  # it copies as many unless it says so


def _timed(result: Result, **axes: str | int) -> Iterator[Group]:
    return result.select(**axes, clock=names.DEVICE_TIME)


def _times(result: Result) -> Iterator[Demand]:
    nothing = Group("", {})
    for axes, part, implementation, limit in EXTRA:
        work = "q, k and v" if axes is GROUP else "a layer"
        what = f"{work}, {part}: % that {implementation} adds to the {names.BARE}"
        for group in [*_timed(result, **axes, **{"pass": part})] or [nothing]:
            found = ratio(group, implementation, names.BARE)
            yield Demand(what, True, limit, found and Ratio(*(100 * (value - 1) for value in found)))
    layer = next(_timed(result, **LAYER, **{"pass": names.BOTH}), nothing)
    for implementation, limit in AS_FAST:
        yield Demand(
            f"a layer, {names.BOTH}: {implementation} ÷ {names.FAST}",
            False,
            limit,
            ratio(layer, implementation, names.FAST),
        )


def _bandwidths(result: Result) -> Iterator[Demand]:
    """Of each kernel the slowest cell, in the configuration that it has by default: the first one."""
    for kernel in KERNELS:
        found = []
        for group in _timed(result, suite="kernels"):
            implementation = next((name for name in group.timings if name != names.COPY), None)
            if group.axes["kernel"] == kernel and implementation and int(group.axes["tokens"]) >= TOKENS:
                found.append(
                    (share_of_copy(result, group, implementation), f"{group.name}, {implementation}")
                )
        share, where = min((one for one in found if one[0]), default=(None, f"from {TOKENS} tokens"))
        yield Demand(f"{kernel}: bandwidth ÷ that of a copy; {where}", False, SHARE, share)


def _errors(result: Result) -> Iterator[Demand]:
    layer = next(_timed(result, **LAYER, **{"pass": names.BOTH}), None)
    for what in ("y", "dx", "dA"):
        pair = [
            facts(result, layer, implementation).get(f"error of {what}") if layer else None
            for implementation in (names.FAST, names.STOCK)
        ]
        measured = None if None in pair else pair[0] / pair[1]
        yield Demand(f"a layer: error of {what} ÷ that of {names.STOCK}", True, ERROR, measured)
