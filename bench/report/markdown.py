"""The report of a result as Markdown: a table a suite. Every figure in it follows from the result.

Ratios are taken within a round, in which the implementations took turns: the median and, in brackets, its 95
% confidence interval (`bench.results.cell.interval`).
"""

from __future__ import annotations

from collections import Counter
from statistics import median

from bench.report.words import Row, in_short, markdown, ratios, shape_in_words, waited_for
from bench.results.cell import Group
from bench.results.schema import Result
from bench.results.throughput import number

TOLD_LAST = ("size", "commit", "uncommitted_changes", "datetime")  # of the machine
DRY = "**A dry run: tiny shapes, interpreted kernels, the host's clock. Its times are not measurements.**"
HOW = (
    "Ratios are taken within a round, in which the implementations took turns: the median and its 95 %"
    " confidence interval. Throughput is that of the median round."
)
CPU_TIME = (
    "Times are CPU time of the process, which has one thread, unless a cell says otherwise; “wall ÷ CPU” is"
    " what the wall clock says, over that, and 1 where nothing else ran on this core."
)


def report(result: Result) -> str:
    """Markdown."""
    device = result.machine.get("device", "cpu")
    groups = waited_for(result)
    is_cpu_time = any(timing.wall for group in groups for timing in group.timings.values())
    parts = ["# What it costs"]
    if device == "dry run":
        parts += [DRY, _head(result.machine), HOW]
    else:
        parts += [_head(result.machine), HOW]
        if is_cpu_time:
            parts += [CPU_TIME, quietness(groups)]
        parts += ["## In short: mica.fast, times as fast", markdown(in_short(groups))]
    if result.refused:
        parts.append(refused_text(result.refused))
    if result.stages:
        parts += ["## What ran", markdown(stage_table(result.stages))]
    if result.checks:
        parts += ["## Checks", *checks_text(result.checks)]
    for suite in dict.fromkeys(group.axes.get("suite", "suites") for group in groups):
        cells = [group for group in groups if group.axes.get("suite", "suites") == suite]
        parts += [f"## {suite.capitalize()}", markdown(suite_table(cells))]
    return "\n\n".join(parts) + "\n"


def _head(machine: dict) -> str:
    if not machine:
        return "The machine is unknown, and so is whether these times are measurements."
    words = [f"{name} {value}" for name, value in machine.items() if value and name not in TOLD_LAST]
    if machine.get("bf16 instructions") == "":
        words.append("no bf16 instructions")
    changes = " with changes" if machine.get("uncommitted_changes") else ""
    commit = f"commit {str(machine.get('commit'))[:12]}{changes}"
    when = str(machine.get("datetime"))[:16]
    return f"{', '.join(words)}; {commit}, {when}, a {machine.get('size')} run."


def suite_table(groups: list[Group]) -> list[Row]:
    """A row an implementation of a cell: the axes that cells differ in, time, throughput, ratios, facts."""
    longest = max(timing.median for group in groups for timing in group.timings.values())
    unit, factor = ("s", 1.0) if longest >= 1 else ("ms", 1e3)
    rows = []
    for group, label in zip(groups, _labels(groups), strict=True):
        for name, timing in group.timings.items():
            times = {"implementation": name, unit: f"{factor * timing.median:.4g}"}
            if timing.waiting is not None:
                times["wall ÷ CPU"] = f"{timing.waiting:.2f}"
            rates = {rate: number(value) for rate, value in timing.throughput.items()}
            facts = {_in_words(fact): f"{value:.4g}" for fact, value in timing.facts.items()}
            rows.append((label, times, rates, ratios(group, name), facts))
            label = {}  # the next row is of the same cell
    return _side_by_side(rows)


def _labels(cells: list[Group]) -> list[dict[str, str]]:
    """What tells each of the cells apart from the others."""
    shapes = [shape_in_words(cell.axes) for cell in cells]
    axes = dict.fromkeys(axis for shape in shapes for axis in shape)
    differing = [axis for axis in axes if len({shape.get(axis) for shape in shapes}) > 1]
    labels = [{axis: str(shape[axis]) for axis in differing if axis in shape} for shape in shapes]
    if any(labels.count(label) > 1 for label in labels):
        return [{"cell": cell.name, **label} for cell, label in zip(cells, labels, strict=True)]
    return labels


def _in_words(fact: str) -> str:
    return fact.replace("_mb", " MB").replace("_", " ")


def _side_by_side(rows: list[tuple[dict[str, str], ...]]) -> list[Row]:
    """A table of rows in parts: the columns of all first parts, then those of the second ones, and so on.

    A column in which no row has anything is left out.
    """
    header = []
    lines = [[] for _ in rows]
    for parts in zip(*rows, strict=True):
        columns = dict.fromkeys(column for part in parts for column in part)
        for column in columns:
            cells = [part.get(column, "") for part in parts]
            if any(cells):
                header.append(column)
                for line, cell in zip(lines, cells, strict=True):
                    line.append(cell)
    return [header, *lines]


def quietness(groups: list[Group]) -> str:
    """How long the cells waited for a core, in a sentence: the largest wall ÷ CPU of each."""
    waited = []
    for group in groups:
        of_cell = [timing.waiting for timing in group.timings.values() if timing.waiting is not None]
        if of_cell:
            waited.append((max(of_cell), group.name))
    most, cell = max(waited)
    middle = median(ratio for ratio, _ in waited)
    told = f"wall ÷ CPU was {middle:.2f} in the median cell, and {most:.2f} in {cell}"
    return f"How quiet the machine was: {told}."


def refused_text(refused: list[dict[str, str]]) -> str:
    lines = ["**No number**, and why:\n"]
    for one in refused:
        what = ", ".join(one[name] for name in ("group", "implementation") if one.get(name))
        lines.append(f"- {what}: {one['why']}")
    return "\n".join(lines)


def stage_table(stages: list[dict]) -> list[Row]:
    """A row a stage. One in which nothing passed has not passed, whatever its tests were skipped for."""
    counts = ("seconds", "passed", "failed", "skipped")
    rows = [["stage", "state", *counts, "was doing"]]
    for stage in stages:
        counted = [str(stage.get(name, "")) for name in counts]
        doing = ", ".join(map(str, stage.get("was_doing", {}).values()))
        rows.append([stage["stage"], _state(stage), *counted, doing])
    return rows


def _state(stage: dict) -> str:
    if stage["state"] != "passed":
        return f"**{stage['state']}**"
    if not stage.get("passed"):
        return "**nothing ran**"
    if stage.get("skipped"):
        return f"**passed but for {stage['skipped']} skipped**"
    return "passed"


def checks_text(checks: list[dict[str, str]]) -> list[str]:
    """How many had which outcome, then those that did not pass, with why."""
    counts = Counter(one["outcome"] for one in checks)
    outcomes = ", ".join(f"{count} {name}" for name, count in counts.items())
    parts = [f"{len(checks)} checks: {outcomes}."]
    for outcome, title in (("failed", "Failed"), ("skipped", "Skipped, so not checked")):
        lines = []
        for one in checks:
            if one["outcome"] == outcome:
                why = one.get("why", "no reason given")
                lines.append(f"- {one['stage']}, {one['name']}: {why}")
        if lines:
            parts.append(f"**{title}**:\n\n" + "\n".join(lines))
    return parts
