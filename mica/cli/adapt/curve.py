"""The course of a run as ``curve.csv`` and ``curve.png``, written anew after each evaluation."""

import sys
from functools import lru_cache
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state
from matplotlib.ticker import EngFormatter, MaxNLocator

from mica.cli import record
from mica.cli.output import one_line, shown
from mica.cli.plot import STYLE

COLUMNS = {  # of curve.csv: names in the Trainer's log_history
    "step": "step",
    "tokens": "num_input_tokens_seen",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "held_out_perplexity": "eval_held_out_perplexity",
    "retain_perplexity": "eval_retain_perplexity",
}
# Distinct from each other for all common kinds of colour blindness, and in grey.
_COLOURS = {"loss": "#0072B2", "held_out_perplexity": "#D55E00", "retain_perplexity": "#009E73"}
_LABELS = {"held_out_perplexity": "held out", "retain_perplexity": "to be retained"}
_print_once = lru_cache(print)


def write_curve(history: list[dict], output: Path) -> None:
    """Write ``output``/curve.csv and curve.png; ``history`` is the Trainer's ``state.log_history``.

    On the main process. Each file is renamed into place, so that a running job can be watched. Whatever
    fails is one warning on stderr (the same only once) and never ends a run.
    """
    try:
        if not (rows := table(history)):
            return
        lines = [COLUMNS, *(["" if cell is None else str(cell) for cell in row.values()] for row in rows)]
        text = "".join(f"{','.join(line)}\n" for line in lines)
        record.claimed(output, "curve.csv", lambda path: path.write_text(text, encoding="utf-8"))
        with rc_context({**STYLE, "lines.linewidth": 1.2, "lines.markersize": 3}):
            drawn = figure(rows, shown(output.resolve().name))
            record.claimed(output, "curve.png", lambda path: drawn.savefig(path, format="png"))
    except Exception as error:  # the training is worth more than its picture
        _print_once(f"mica adapt: warning: no curve: {one_line(error)}", file=sys.stderr)


def table(history: list[dict]) -> list[dict]:
    """One row per logged or evaluated step, in order: the keys of `COLUMNS` -> number or None."""
    rows: dict[int, dict] = {}
    for entry in history:
        found = {column: entry[name] for column, name in COLUMNS.items() if entry.get(name) is not None}
        if found.keys() & _COLOURS.keys():
            rows.setdefault(entry["step"], dict.fromkeys(COLUMNS)).update(found)
    return [rows[step] for step in sorted(rows)]


def figure(rows: list[dict], name: str) -> Figure:
    """Training loss above, perplexities below, over the optimiser steps; tokens along the upper edge.

    ``rows``: see `table`. A quantity that was never measured is left out; without any perplexity there is
    one panel. Lines have the gid of their column.
    """
    points = {key: [(row["step"], row[key]) for row in rows if row[key] is not None] for key in _COLOURS}
    count = 2 if any(points[key] for key in _LABELS) else 1
    drawing = Figure(figsize=(7, 1.2 + 2.4 * count), dpi=150, layout="constrained")
    panels = drawing.subplots(count, 1, sharex=True, squeeze=False).flatten()
    for key, measured in points.items():
        if measured:
            style = {"color": _COLOURS[key], "marker": "o" if len(measured) <= 40 else None, "gid": key}
            panels[int(key in _LABELS)].plot(*zip(*measured, strict=True), label=_LABELS.get(key), **style)
    panels[0].set_ylabel("training loss (nats per token)")
    if count == 2:
        panels[1].set_ylabel("perplexity")
        panels[1].legend()
    panels[-1].set_xlabel("optimiser step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))  # which the panels share
    ratios = [row["tokens"] / row["step"] for row in rows if row["step"] and row["tokens"]]
    if ratios:  # blocks are full, so that tokens go with the steps
        each = ratios[-1]
        upper = panels[0].secondary_xaxis("top", functions=(lambda x: x * each, lambda x: x / each))
        upper.set_xlabel("tokens")
        upper.xaxis.set_major_formatter(EngFormatter(sep=""))
    drawing.suptitle(name, parse_math=False)
    return drawing
