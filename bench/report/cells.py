"""Which cells of a result a table or a line of the summary covers: each once, and one clock at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from bench.results.cell import Group, Ratio
from bench.results.names import BOTH, DEVICE_TIME, GRAPH, WALL
from bench.results.schema import Result

CLOCKS = (DEVICE_TIME, GRAPH, WALL)  # in the order of tables


def clocks(result: Result) -> list[str]:
    """Those that cells were timed by; none on a CPU, which has only one."""
    used = {group.axes.get("clock") for group in result.groups}
    return [clock for clock in CLOCKS if clock in used]


def by_clock(result: Result, clock: str) -> Result:
    """The cells timed by this clock; cells that name none are wall-clock times."""
    return replace(result, groups=[one for one in result.groups if one.axes.get("clock", WALL) == clock])


def whole(result: Result) -> Iterator[Group]:
    """The sums of forward and backward, and the cells that have no passes."""
    return (group for group in result.groups if group.axes.get("pass") in (None, BOTH))


def having(implementations: set[str], groups: Iterable[Group]) -> Iterator[Group]:
    """The groups in which all of these have a number."""
    return (group for group in groups if implementations <= group.timings.keys())


def ratio(group: Group, name: str, baseline: str) -> Ratio | None:
    """name ÷ baseline; None unless both have a number."""
    return group.ratio(name, baseline) if {name, baseline} <= group.timings.keys() else None


def facts(result: Result, group: Group, name: str) -> dict[str, float]:
    """What was counted in addition to the time. It is noted once, in the cell of one of the clocks."""
    axes = {axis: value for axis, value in group.axes.items() if axis != "clock"}
    merged: dict[str, float] = {}
    for same in result.select(**axes):
        if same.axes.keys() - {"clock"} == axes.keys() and name in same.timings:
            merged |= same.timings[name].facts
    return merged
