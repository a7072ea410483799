"""Axes, ratios and tables in the words of a report or a page."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.names import BARE, LORA, STOCK

Row = list[str]

# What an implementation's time is divided by, round by round, where its cell has it
BASELINES = (BARE, STOCK, names.STOCK_16, names.STOCK_UNCAST, LORA, names.SVD, names.EIGH, names.COPY)


def shape_in_words(axes: dict[str, str | int]) -> dict[str, str | int]:
    """Axes with "out × in" in place of "out" and "in"."""
    shown = {}
    for axis, value in axes.items():
        if axis == "out" and "in" in axes:
            shown["out × in"] = f"{value} × {axes['in']}"
        elif axis != "in" or "out" not in axes:
            shown[axis] = value
    return shown


def against(baseline: str) -> str:
    """The column of ratios to it."""
    return f"÷ {baseline}"


def ratios(group: Group, name: str) -> dict[str, Ratio]:
    """An implementation's time ÷ that of each baseline of its cell; none of the bare model's."""
    found = {}
    if name == BARE:
        return found
    for baseline in BASELINES:
        if baseline in group.timings and baseline != name:
            found[against(baseline)] = group.ratio(name, baseline)
    return found


def shows_no_difference(ratio: Ratio) -> bool:
    """Whether its interval contains 1: neither is shown to be faster."""
    return ratio.low <= 1 <= ratio.high


def shown(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def speedup(ratio: Ratio, digits: int = 2) -> str:
    """How many times as fast, of a ratio of times, as a page has it."""
    highest = 1 / ratio.low if ratio.low else inf
    middle, low, high = (f"{value:.{digits}f}" for value in (1 / ratio.median, 1 / ratio.high, highest))
    return f"{middle}× ({low}–{high})"


def markdown(header: Row, rows: Iterable[Row]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
