"""The report of a result as Markdown. Every figure in it follows from the result.

Ratios are taken within a round, in which the implementations took turns: the median and, in brackets, its 95
% confidence interval (`bench.results.schema.interval`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bench.report.cells import by_clock, clocks, facts, ratio, whole
from bench.report.summary import summary
from bench.report.targets import share_of_copy, targets
from bench.results import names
from bench.results.cell import Group
from bench.results.names import BARE, BOTH, FAST, LORA, STOCK
from bench.results.schema import Result
from bench.results.throughput import number

ONE_PROCESS = "1 process"
BASELINES = (BARE, STOCK, names.STOCK_16, LORA, names.FLOAT32, names.SVD, ONE_PROCESS)
MACHINE = ("cpu", "bf16 instructions", "instructions limited to", "device", "threads")
MACHINE += ("torch", "peft", "transformers", "triton", "bitsandbytes", "python")
# In the tables of layers: (column, implementation, baseline)
LAYER_RATIOS = (
    ("stock ÷ bare", STOCK, BARE),
    ("mica.fast ÷ bare", FAST, BARE),
    ("mica.fast ÷ stock", FAST, STOCK),
    ("16-bit adapters ÷ stock", names.STOCK_16, STOCK),
    ("these compiled ÷ stock", names.COMPILED, STOCK),
    ("LoRA ÷ stock", LORA, STOCK),
    ("control ÷ stock", names.ATEN, STOCK),
    ("mica.fast compiled ÷ stock", names.COMPILED_FAST, STOCK),
    ("compiled plain ÷ stock", names.COMPILED_PLAIN, STOCK),
    ("mica.fast ÷ stock, autocast", names.AUTOCAST_FAST, names.AUTOCAST),
)
DRY = "**A dry run: tiny shapes, interpreted kernels, the host's clock. Its times are not measurements.**"


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def group_table(group: Group) -> str:
    """One row per implementation: seconds, throughput, ratios to the baselines, what was counted."""
    present = [name for name in BASELINES if name in group.timings and len(group.timings) > 1]
    # LoRA's overhead over the bare model is compared, too
    overheads = [LORA] if {LORA, BARE} <= group.timings.keys() else []
    counted = list(dict.fromkeys(key for timing in group.timings.values() for key in timing.facts))
    titles = [*(f"÷ {name}" for name in present), *(f"overhead ÷ that of {name}" for name in overheads)]
    units = list(dict.fromkeys(unit for timing in group.timings.values() for unit in timing.throughput))
    rows = []
    for name, timing in group.timings.items():
        row = [name, f"{timing.median:.4g}"]
        row += [number(timing.throughput[unit]) if unit in timing.throughput else "" for unit in units]
        row += [str(group.ratio(name, base)) for base in present]
        row += [str(group.overhead(name, base) or "") for base in overheads]
        rows.append(row + [f"{timing.facts[key]:.4g}" if key in timing.facts else "" for key in counted])
    header = ["implementation", "median s", *units, *titles, *counted]
    return f"### {group.name}\n\n" + markdown_table(header, rows)


def layer_table(result: Result, dtype: str, clock: str) -> str | None:
    """One row per cell, forward and backward summed."""
    groups = sorted(
        by_clock(result, clock).select(suite="layer", dtype=dtype, **{"pass": BOTH}),
        key=lambda one: (one.axes["out"] * one.axes["in"], one.axes["rank"], one.axes["tokens"]),
    )
    if not groups:
        return None
    columns = [one for one in LAYER_RATIOS if any({*one[1:]} <= group.timings.keys() for group in groups)]
    rows = []
    for group in groups:
        axes, bare = group.axes, group.timings.get(BARE)
        row = [str(axes["tokens"]), f"{axes['out']} x {axes['in']}", str(axes["rank"])]
        row += [f"{1e3 * bare.median:.3g}" if bare else ""]
        row += [str(ratio(group, implementation, base) or "") for _, implementation, base in columns]
        rates = [_tokens_per_second(group, name) for name in (BARE, STOCK, FAST)]
        row += [" / ".join(rates)]
        saved = [facts(result, group, name).get("saved_mb") for name in (STOCK, FAST)]
        rows.append([*row, "" if None in saved else f"{saved[0]:.3g} → {saved[1]:.3g}"])
    header = ["tokens", "out x in", "r", "bare ms", *(one[0] for one in columns)]
    header += ["tokens/s, bare / stock / mica", "saved MB, stock → mica"]
    suffix = f", {clock}" if clocks(result) else ""
    return f"### Layers, {dtype}, forward + backward{suffix}\n\n" + markdown_table(header, rows)


def _tokens_per_second(group: Group, name: str) -> str:
    timing = group.timings.get(name)
    return "–" if timing is None else number(timing.throughput["tokens/s"])


def bandwidth_table(result: Result, clock: str) -> str | None:
    """One row per configuration of a kernel; bytes are those that it must read and write."""
    rows = []
    for group in by_clock(result, clock).select(suite="kernels"):
        axes = group.axes
        shape = f"{axes['tokens']} x {axes['features']}, r = {axes['rank']}, {axes['dtype']}"
        for name, timing in group.timings.items():
            count = facts(result, group, name).get("bytes")
            row = [str(axes["kernel"]), shape, name, f"{1e6 * timing.median:.4g}"]
            row += [f"{count / timing.median / 1e9:.4g}" if count else ""]
            rows.append([*row, str(share_of_copy(result, group, name) or "")])
    header = ["kernel", "tokens x features", "configuration", "µs", "GB/s", "÷ that of the copy"]
    return f"### {clock.capitalize()}\n\n" + markdown_table(header, rows) if rows else None


def stage_table(stages: list[dict]) -> str:
    """One row per stage. One in which nothing passed has not passed, whatever its tests were skipped for."""
    rows = []
    for stage in stages:
        state, skipped = str(stage["state"]), stage.get("skipped", 0)
        if state == "passed" and (skipped or not stage.get("passed")):
            state = f"passed but for {skipped} skipped" if stage.get("passed") else "nothing ran"
        doing = ", ".join(map(str, stage.get("was_doing", {}).values()))
        row = [str(stage["stage"]), state if state == "passed" else f"**{state}**"]
        row += [str(stage.get(name, "")) for name in ("seconds", "passed", "failed", "skipped")]
        rows.append([*row, doing])
    return markdown_table(["stage", "state", "seconds", "passed", "failed", "skipped", "was doing"], rows)


def checks_text(checks: list[dict[str, str]]) -> list[str]:
    """How many had which outcome, then those that did not pass, with why."""
    counts = Counter(one["outcome"] for one in checks)
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


def _tables(result: Result) -> list[str]:
    """Suite by suite, under the names that ``-k`` selects them by."""
    parts = []
    for suite in dict.fromkeys(str(group.axes.get("suite", "")) for group in result.groups):
        tables: list[str | None] = []
        for clock in clocks(result) or [names.WALL]:
            if suite == "layer":
                tables += [layer_table(result, dtype, clock) for dtype in ("bfloat16", "float32")]
            elif suite == "kernels":
                tables.append(bandwidth_table(result, clock))
            else:
                cells = whole(by_clock(result, clock))
                tables += [group_table(one) for one in cells if one.axes.get("suite", "") == suite]
        if any(tables):
            parts += [f"## {suite.capitalize() or 'Suites'}", *filter(None, tables)]
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
    result, device = result.with_both(), result.machine.get("device", "cpu")
    on_gpu = device != "cpu" or bool(clocks(result))
    parts = [
        "# What it costs",
        *([DRY] if device == "dry run" else []),
        _head(result.machine),
        "Ratios are taken within a round, in which the implementations took turns: the median and its 95 %"
        " confidence interval. Overhead is the ratio to the bare frozen model, minus 1.",
    ]
    if on_gpu and device != "dry run":
        rows = [one.row for one in targets(result)]
        parts += ["## Targets", markdown_table(["what", "target", "measured", "met"], rows)]
    parts += ["\n".join(summary(result))] if device != "dry run" else []
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
    return "\n\n".join([*parts, *_tables(result)]) + "\n"
