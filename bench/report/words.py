"""Axes, ratios and tables in the words of a report or a page."""

from __future__ import annotations

from statistics import median

from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.names import BARE, BOTH, FAST, LORA, NO_GRADIENT, STOCK
from bench.results.schema import Result

Row = list[str]

# What an implementation's time is divided by, round by round, where its cell has it
CHECKPOINTED = tuple(names.checkpointed(name, 1) for name in (STOCK, names.STOCK_16))
BASELINES = (
    *(BARE, STOCK, names.STOCK_16, names.STOCK_UNCAST, *CHECKPOINTED),
    *(LORA, names.SVD, names.EIGH, names.COPY),
)


def shape_in_words(axes: dict[str, str | int]) -> dict[str, str | int]:
    """Axes with "out × in" in place of "out" and "in"."""
    shown = {}
    for axis, value in axes.items():
        if axis == "out" and "in" in axes:
            shown["out × in"] = f"{value} × {axes['in']}"
        elif axis != "in" or "out" not in axes:
            shown[axis] = value
    return shown


def ratios(group: Group, name: str) -> dict[str, str]:
    """An implementation's time ÷ that of each baseline, "" of those that are not in its cell.

    The bare model's is divided by none.
    """
    if name == BARE:
        return {}
    cells = {}
    for baseline in BASELINES:
        is_other = baseline in group.timings and baseline != name
        cells[f"÷ {baseline}"] = str(group.ratio(name, baseline)) if is_other else ""
    return cells


def shown(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def markdown(rows: list[Row]) -> str:
    """A table, of which the first row is the header; not padded, so that another figure changes one line."""
    header, *others = rows
    lines = [header, ["---"] * len(header), *others]
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines)


def waited_for(result: Result) -> list[Group]:
    """Cells of the passes that a user waits for: no forward or backward alone."""
    groups = result.with_both().groups
    return [group for group in groups if group.axes.get("pass") in (None, BOTH, NO_GRADIENT)]


def in_short(groups: list[Group]) -> list[Row]:
    """How many times as fast mica.fast is as what it is compared with, over the cells of each suite."""
    factors: dict[tuple[str, str], list[float]] = {}
    for baseline in BASELINES:
        for group in groups:
            if baseline != BARE and {FAST, baseline} <= group.timings.keys():
                suite = ", ".join(group.axes[axis] for axis in ("suite", "clock") if axis in group.axes)
                found = factors.setdefault((suite, baseline), [])
                found.append(1 / group.ratio(FAST, baseline).median)
    if not factors:
        return [[f"Nothing was compared with {FAST}."]]
    rows = [["suite", "against", "cells", "least", "median", "most", "slower in"]]
    for kind, found in sorted(factors.items()):
        spans = [f"{value:.2f}×" for value in (min(found), median(found), max(found))]
        slower = sum(factor < 1 for factor in found)
        rows.append([*kind, str(len(found)), *spans, str(slower or "none")])
    return rows
