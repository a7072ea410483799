"""The report of a result as Markdown: a table a suite, by pandas. Every figure in it follows from the result.

Ratios are taken within a round, in which the implementations took turns: the median and, in brackets, its 95
% confidence interval (`bench.results.cell.interval`).
"""

from __future__ import annotations

from collections import Counter
from statistics import median

import pandas as pd

from bench.report import prediction
from bench.report.targets import targets
from bench.report.words import BASELINES, against, in_short, markdown, ratios, shape_in_words, waited_for
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
        if device != "cpu":
            parts += ["## Targets", table(targets(result.with_both()))]
        parts += ["## In short: mica.fast, times as fast", markdown(in_short(groups))]
    if result.predictions:
        parts += ["## Prediction and measurement", *prediction.text(result, is_dry=device == "dry run")]
    if result.refused:
        parts.append(refused_text(result.refused))
    if result.stages:
        parts += ["## What ran", stage_table(result.stages)]
    if result.checks:
        parts += ["## Checks", *checks_text(result.checks)]
    for suite in dict.fromkeys(group.axes.get("suite", "suites") for group in groups):
        cells = [group for group in groups if group.axes.get("suite", "suites") == suite]
        parts += [f"## {suite.capitalize()}", suite_table(cells)]
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


def table(data: pd.DataFrame) -> str:
    """As it stands; what is missing is empty."""
    return data.fillna("").to_markdown(index=False, disable_numparse=True)


def suite_table(groups: list[Group]) -> str:
    """A row an implementation of a cell: the axes that cells differ in, time, throughput, ratios, facts."""
    rows = [(group, name, timing) for group in groups for name, timing in group.timings.items()]
    labels = _labels(groups, [group for group, *_ in rows])
    seconds = pd.Series([timing.median for *_, timing in rows])
    times = pd.DataFrame({"implementation": [name for _, name, _ in rows]})
    if seconds.max() >= 1:
        times["s"] = seconds.map("{:.4g}".format)
    else:
        times["ms"] = (1e3 * seconds).map("{:.4g}".format)
    waiting = pd.Series([timing.waiting for *_, timing in rows], dtype=float)
    if waiting.notna().any():
        times["wall ÷ CPU"] = waiting.map("{:.2f}".format, na_action="ignore")
    rates = pd.DataFrame([timing.throughput for *_, timing in rows], dtype=object)
    columns = [against(baseline) for baseline in BASELINES]
    divided = pd.DataFrame([ratios(group, name) for group, name, _ in rows], columns=columns, dtype=object)
    divided = divided.dropna(axis=1, how="all")
    facts = pd.DataFrame([timing.facts for *_, timing in rows], dtype=object)
    facts.columns = [fact.replace("_mb", " MB").replace("_", " ") for fact in facts]
    shown = [
        labels,
        times,
        rates.map(number, na_action="ignore"),
        divided.map(str, na_action="ignore"),
        facts.map("{:.4g}".format, na_action="ignore"),
    ]
    return table(pd.concat(shown, axis=1))


def _labels(cells: list[Group], rows: list[Group]) -> pd.DataFrame:
    """What tells the cells apart, of each row; nothing where it is that of the row above."""
    values = pd.DataFrame([{"suite": "", **shape_in_words(cell.axes)} for cell in cells], dtype=object)
    axes = [axis for axis in values if values[axis].nunique(dropna=False) > 1]
    labels = pd.DataFrame([shape_in_words(group.axes) for group in rows], columns=axes, dtype=object)
    names = pd.Series([group.name for group in rows])
    if values.duplicated(axes or "suite").any():  # the axes do not
        labels.insert(0, "cell", names)
    return labels.apply(lambda column: column.mask(names.duplicated(), ""))


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


def stage_table(stages: list[dict]) -> str:
    """A row a stage. One in which nothing passed has not passed, whatever its tests were skipped for."""
    rows = []
    for stage in stages:
        row = {"stage": stage["stage"], "state": _state(stage)}
        for name in ("seconds", "passed", "failed", "skipped"):
            row[name] = str(stage.get(name, ""))
        row["was doing"] = ", ".join(map(str, stage.get("was_doing", {}).values()))
        rows.append(row)
    return table(pd.DataFrame(rows))


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
