"""The report of a result as Markdown: a table a suite, by pandas. Every figure in it follows from the result.

Ratios are taken within a round, in which the implementations took turns: the median and, in brackets, its 95
% confidence interval (`bench.results.cell.interval`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from bench.report.frame import BASELINES, CELL, IMPLEMENTATION, OVERHEAD, SECONDS, against, frame
from bench.report.targets import targets
from bench.results.names import BARE, FAST, WALL
from bench.results.schema import Result
from bench.results.throughput import UNITS, number

MACHINE = ("cpu", "bf16 instructions", "instructions limited to", "device", "threads")
MACHINE += ("torch", "peft", "transformers", "triton", "bitsandbytes", "python")
AXES = ("model", "kernel", "tokens", "sequence", "new tokens", "features", "out × in", "layers", "weights")
AXES += ("experts", "rank", "dtype", "autocast", "how", "pass", "call", "clock")
HEADERS = {"rank": "r", "how": "run under", "saved_mb": "saved MB", "peak_mb": "peak MB"}
HEADERS |= {"trained_mb": "trained MB", "optimizer_mb": "optimizer MB", "weights_changed": "weights changed"}
RATES = tuple(unit for unit, _ in UNITS.values())
RATIOS = tuple(against(baseline) for baseline in BASELINES)
DRY = "**A dry run: tiny shapes, interpreted kernels, the host's clock. Its times are not measurements.**"


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(data: pd.DataFrame) -> str:
    """As it stands; what is missing is empty."""
    return data.fillna("").to_markdown(index=False, disable_numparse=True)


def suite_table(data: pd.DataFrame) -> str:
    """A row an implementation of a cell: the axes that cells differ in, time, throughput, ratios, facts."""
    axes = [axis for axis in AXES if axis in data and data[axis].nunique(dropna=False) > 1]
    unit, scale = ("s", 1.0) if data[SECONDS].max() >= 1 else ("ms", 1e3)
    shown = data[axes].astype(object)
    cells = data.drop_duplicates(CELL)
    if cells.duplicated(axes or "suite").any():  # the axes do not tell all of them apart
        shown.insert(0, CELL, data[CELL])
    shown[IMPLEMENTATION] = data[IMPLEMENTATION]
    shown[unit] = (scale * data[SECONDS]).map("{:.4g}".format)
    for rate in _present(data, RATES):
        shown[rate] = data[rate].map(number, na_action="ignore")
    for ratio in _present(data, (*RATIOS, OVERHEAD)):
        shown[ratio] = data[ratio].map(str, na_action="ignore")
    for fact in _facts(data):
        shown[fact] = data[fact].map("{:.4g}".format, na_action="ignore")
    named = shown.columns[: list(shown.columns).index(IMPLEMENTATION)]
    shown.loc[data[CELL].duplicated(), named] = ""  # the cell of the row above
    return table(shown.rename(columns=HEADERS))


def _present(data: pd.DataFrame, columns: Iterable[str]) -> list[str]:
    return [column for column in columns if column in data and data[column].notna().any()]


def _facts(data: pd.DataFrame) -> list[str]:
    known = {"suite", CELL, IMPLEMENTATION, SECONDS, OVERHEAD, *AXES, *RATES, *RATIOS}
    return _present(data, [column for column in data if column not in known])


def in_short(data: pd.DataFrame) -> str:
    """How many times as fast mica.fast is as what it is compared with, over the cells of each suite."""
    rows = []
    if not len(data):
        return f"{FAST} was compared with nothing."
    ours = data[data[IMPLEMENTATION] == FAST]
    for ratio in _present(ours, [one for one in RATIOS if one != against(BARE)]):
        compared = ours[ours[ratio].notna()]
        faster = 1 / compared[ratio].map(lambda one: one.median)
        by_suite = faster.astype(float).groupby([compared["suite"], compared["clock"]], sort=False)
        for (suite, clock), factors in by_suite:
            low, middle, high = (f"{one:.2f}×" for one in (factors.min(), factors.median(), factors.max()))
            slower = str((factors < 1).sum() or "none")
            rows.append([suite, clock, ratio[2:], str(len(factors)), low, middle, high, slower])
    columns = ["suite", "clock", "against", "cells", "least", "median", "most", "cells in which it is slower"]
    if not rows:
        return f"{FAST} was compared with nothing."
    short = pd.DataFrame(rows, columns=columns)
    return table(short if short["clock"].nunique() > 1 else short.drop(columns="clock"))


def stage_table(stages: list[dict]) -> str:
    """One row per stage. One in which nothing passed has not passed, whatever its tests were skipped for."""
    rows = []
    for stage in stages:
        state, skipped = str(stage["state"]), stage.get("skipped", 0)
        if state == "passed" and not stage.get("passed"):
            state = "nothing ran"
        elif state == "passed" and skipped:
            state = f"passed but for {skipped} skipped"
        rows.append(
            {
                "stage": stage["stage"],
                "state": state if state == "passed" else f"**{state}**",
                **{name: str(stage.get(name, "")) for name in ("seconds", "passed", "failed", "skipped")},
                "was doing": ", ".join(map(str, stage.get("was_doing", {}).values())),
            }
        )
    return table(pd.DataFrame(rows))


def checks_text(checks: list[dict[str, str]]) -> list[str]:
    """How many had which outcome, then those that did not pass, with why."""
    counts = pd.Series([one["outcome"] for one in checks]).value_counts(sort=False)
    parts = [f"{len(checks)} checks: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + "."]
    for outcome, title in (("failed", "Failed"), ("skipped", "Skipped, so not checked")):
        lines = [
            f"- {one['stage']}, {one['name']}: {one.get('why', 'no reason given')}"
            for one in checks
            if one["outcome"] == outcome
        ]
        if lines:
            parts.append(f"**{title}**:\n\n" + "\n".join(lines))
    return parts


def _head(machine: dict) -> str:
    if not machine:
        return "The machine is unknown, and so is whether these times are measurements."
    text = ", ".join(f"{name} {machine[name]}" for name in MACHINE if machine.get(name))
    text += ", no bf16 instructions" if machine.get("bf16 instructions") == "" else ""
    commit = str(machine.get("commit"))[:12] + (" with changes" if machine.get("uncommitted_changes") else "")
    return f"{text}; commit {commit}, {str(machine.get('datetime'))[:16]}, a {machine.get('size')} run."


def report(result: Result, pictures: Iterable[tuple[Path, str]] = (), note: str = "") -> str:
    """Markdown; pictures are linked by file name."""
    data, device = frame(result), result.machine.get("device", "cpu")
    parts = [
        "# What it costs",
        *([DRY] if device == "dry run" else []),
        _head(result.machine),
        "Ratios are taken within a round, in which the implementations took turns: the median and its 95 %"
        " confidence interval. Throughput is that of the median round.",
    ]
    has_clocks = len(data) > 0 and set(data["clock"]) != {WALL}  # as only a device has
    if device != "dry run" and (device != "cpu" or has_clocks):
        rows = [one.row for one in targets(result.with_both())]
        parts += ["## Targets", table(pd.DataFrame(rows, columns=["what", "target", "measured", "met"]))]
    if device != "dry run":
        parts += ["## In short: mica.fast, times as fast", in_short(data)]
    if result.refused:
        lines = [
            f"- {', '.join(one[what] for what in ('group', 'implementation') if one.get(what))}: {one['why']}"
            for one in result.refused
        ]
        parts.append("\n".join(["**No number**, and why:\n", *lines]))
    if result.stages:
        parts += ["## What ran", stage_table(result.stages)]
    if result.checks:
        parts += ["## Checks", *checks_text(result.checks)]
    parts += [f"![{caption}]({path.name})\n\n{caption}" for path, caption in pictures]
    parts += [note] if note else []
    for suite, rows in data.groupby("suite", sort=False) if len(data) else ():
        parts += [f"## {suite.capitalize() or 'Suites'}", suite_table(rows)]
    return "\n\n".join(parts) + "\n"
