"""The report of a result file, Markdown and pictures: ``python -m bench.report FILE.json`` writes it again.

Every figure in it follows from the file. Ratios are of one and the same round, the rivals having taken turns:
median, and in brackets an interval that holds the true median with 95 % (`bench.results.interval`).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from bench import model_error, plots, scaling
from bench.report.answers import answers, cells
from bench.results.names import (
    ATEN,
    BARE,
    BOTH,
    COMPILED,
    FAST,
    FLOAT32,
    LORA,
    STOCK,
    STOCK_16,
    SVD,
    UNGROUPED,
)
from bench.results.schema import Group, Result

ONE_PROCESS = "1 process"
BASELINES = (BARE, STOCK, STOCK_16, LORA, UNGROUPED, FLOAT32, SVD, ONE_PROCESS)
# Whose overhead over the bare model the others' is compared with, too.
OVERHEADS = (LORA, UNGROUPED)
MACHINE = (
    "cpu",
    "bf16 instructions",
    "instructions limited to",
    "device",
    "threads",
    "torch",
    "peft",
    "transformers",
    "triton",
    "bitsandbytes",
    "python",
)
TITLES = {
    "initialisation": "Initialisation of a whole model",
    "subspace": "Initialisation of one weight",
    "loading": "Loading an adapter",
    "merge": "Merging",
    "step": "A training step",
    "block": "A decoder block",
    "layers": "Blocks one after the other",
    "quantised": "Over a quantised base",
    "distributed": "Several processes",
    "dtype": "16-bit layers against float32",
    "host layer": "Host time of a layer",
    "host block": "Host time of a decoder block",
    "generation": "Generating, token by token",
    "rate": "What the machine can do",
}
# In the tables of layers: (column, rival, baseline)
LAYER_RATIOS = (
    ("stock ÷ bare", STOCK, BARE),
    ("mica.fast ÷ bare", FAST, BARE),
    ("mica.fast ÷ stock", FAST, STOCK),
    ("16-bit adapters ÷ stock", STOCK_16, STOCK),
    ("these compiled ÷ stock", COMPILED, STOCK),
    ("LoRA ÷ stock", LORA, STOCK),
    ("control ÷ stock", ATEN, STOCK),
)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def group_table(group: Group) -> str:
    """A row a rival: seconds, ratios to the baselines that are there, what was counted."""
    present = [name for name in BASELINES if name in group.rivals and len(group.rivals) > 1]
    overheads = [name for name in OVERHEADS if name in group.rivals and BARE in group.rivals]
    facts = list(dict.fromkeys(key for rival in group.rivals.values() for key in rival.facts))
    titles = [*(f"÷ {name}" for name in present), *(f"overhead ÷ that of {name}" for name in overheads)]
    rows = []
    for name, rival in group.rivals.items():
        row = [name, f"{rival.median:.4g}", *(str(group.ratio(name, base)) for base in present)]
        row += [str(group.overhead(name, base) or "") for base in overheads]
        row += [f"{rival.facts[key]:.4g}" if key in rival.facts else "" for key in facts]
        rows.append(row)
    return f"### {group.name}\n\n" + markdown_table(["rival", "median s", *titles, *facts], rows)


def layer_table(result: Result, dtype: str) -> str | None:
    """A row a cell, forward and backward summed."""
    groups = sorted(
        result.select(suite="layer", dtype=dtype, **{"pass": BOTH}),
        key=lambda one: (one.axes["out"] * one.axes["in"], one.axes["rank"], one.axes["tokens"]),
    )
    columns = [one for one in LAYER_RATIOS if any({*one[1:]} <= group.rivals.keys() for group in groups)]
    header = [
        "tokens",
        "out x in",
        "r",
        "bare ms",
        *(title for title, *_ in columns),
        "saved MB, stock → mica",
    ]
    rows = []
    for group in groups:
        axes = group.axes
        row = [str(axes["tokens"]), f"{axes['out']} x {axes['in']}", str(axes["rank"])]
        row.append(f"{1e3 * group.rivals[BARE].median:.3g}")
        for _, rival, base in columns:
            row.append(str(group.ratio(rival, base)) if {rival, base} <= group.rivals.keys() else "")
        saved = [group.rivals[name].facts.get("saved_mb") for name in (STOCK, FAST)]
        row.append("" if None in saved else f"{saved[0]:.3g} → {saved[1]:.3g}")
        rows.append(row)
    if not rows:
        return None
    return f"### Layers, {dtype}, forward + backward\n\n" + markdown_table(header, rows)


def rates_table(groups: list[Group]) -> str:
    rows = []
    for group in groups:
        ((_, measured),) = group.rivals.items()
        flops, bytes_ = (measured.facts[what] / measured.median / 1e9 for what in ("flops", "bytes"))
        what = str(group.axes["rate"])
        rate = f"{1e6 * measured.median:.3g} µs" if what == "call" else f"{bytes_:.0f} GB/s"
        rows.append([what, f"{flops:.0f} Gflop/s" if "product" in what else rate])
    return markdown_table(["what", "rate"], rows)


def error_table(errors: list[model_error.Error]) -> str:
    rows = [[one.suite, one.rival, f"{one.median:.0%}", f"{one.worst:.0%}", str(one.cells)] for one in errors]
    return markdown_table(["suite", "rival", "median error", "worst", "cells"], rows)


def _tables(result: Result) -> list[str]:
    parts = []
    layers = [table for dtype in ("bfloat16", "float32") if (table := layer_table(result, dtype))]
    if layers:
        parts += ["## One layer", *layers]
    suites = list(dict.fromkeys(group.axes.get("suite", "") for group in cells(result)))
    for suite in suites:
        groups = [group for group in cells(result) if group.axes.get("suite", "") == suite]
        if suite == "layer":
            continue
        parts.append(f"## {TITLES.get(str(suite), suite or 'Suites')}")
        parts += [rates_table(groups)] if suite == "rate" else [group_table(group) for group in groups]
    return parts


def report(result: Result, pictures: list[plots.Picture] = ()) -> str:
    """Markdown; pictures are linked by file name."""
    machine, result = result.machine, scaling.summed(result)
    facts = ", ".join(f"{name} {machine[name]}" for name in MACHINE if name in machine)
    commit = str(machine.get("commit"))[:12] + (" with changes" if machine.get("uncommitted_changes") else "")
    parts = [
        "# What it costs",
        f"{facts}; commit {commit}, {str(machine.get('datetime'))[:16]}, a {machine.get('size')} run.",
        "Ratios are of one round, in which rivals took turns: the median, and an interval that holds the true"
        " median with 95 %. The overhead of a rival is its ratio to the bare frozen model, less 1.",
        "\n".join(answers(result)),
    ]
    if result.refused:
        lines = [f"- {one['group']}: {one['why']}" for one in result.refused]
        parts.append(
            "**No number**, because a check before or after the timing failed:\n\n" + "\n".join(lines)
        )
    parts += [f"![{caption}]({path.name})\n\n{caption}" for path, caption in pictures]
    parts += _tables(result)
    fits = [
        fit
        for fit in scaling.fits(result)
        if BOTH in fit.what or fit.axis == "layers" or fit.what.startswith("subspace")
    ]
    if fits:
        parts += ["## How it grows", scaling.table(fits).rstrip()]
    errors = model_error.modelled_errors(result)
    if errors:
        parts += [
            "## The cost model against this run",
            "|modelled ÷ measured - 1| of `bench.model` with the rates above; of a ratio where it says so.",
            error_table(errors),
        ]
    return "\n\n".join(parts) + "\n"


def write(file: Path) -> str:
    """Draw the pictures and write the report beside the result file; returns the report."""
    result = Result.load(file)
    device = model_error.measured_device(result)
    roofline = partial(model_error.layer_seconds, device=device) if device else None
    text = report(result, plots.draw(result, file.parent, file.stem, roofline))
    file.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    print(write(Path(sys.argv[1])), end="")
