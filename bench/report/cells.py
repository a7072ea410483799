"""Which cells of a result a table or an answer is of: each of them once, and one clock at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from bench.results.names import BOTH, DEVICE_TIME, GRAPH, WALL
from bench.results.schema import Group, Ratio, Result

CLOCKS = (DEVICE_TIME, GRAPH, WALL)  # in the order of tables


def clocks(result: Result) -> list[str]:
    """Those that cells were timed by; none on a CPU, which has one only."""
    found = {group.axes.get("clock") for group in result.groups}
    return [clock for clock in CLOCKS if clock in found]


def by_clock(result: Result, clock: str) -> Result:
    """The cells of this clock; without a name of one it is the wall clock."""
    return replace(result, groups=[one for one in result.groups if one.axes.get("clock", WALL) == clock])


def whole(result: Result) -> Iterator[Group]:
    """Forward and backward summed; what has no passes as it is."""
    return (group for group in result.groups if group.axes.get("pass") in (None, BOTH))


def having(implementations: set[str], groups: Iterable[Group]) -> Iterator[Group]:
    """The groups in which all of these have a number."""
    return (group for group in groups if implementations <= group.timings.keys())


def ratio(group: Group, implementation: str, baseline: str) -> Ratio | None:
    """implementation ÷ baseline; None unless both have a number."""
    return next(
        (one.ratio(implementation, baseline) for one in having({implementation, baseline}, [group])), None
    )


def facts(result: Result, group: Group, implementation: str) -> dict[str, float]:
    """What was counted in addition to the time. It is noted once, in the cell of one of the clocks."""
    axes = {name: value for name, value in group.axes.items() if name != "clock"}
    found: dict[str, float] = {}
    for same in result.select(**axes):
        if same.axes.keys() - {"clock"} == axes.keys() and implementation in same.timings:
            found |= same.timings[implementation].facts
    return found
