"""The course of a run as ``curve.csv`` and ``curve.png``, written anew after each evaluation."""

import csv
import sys
from functools import lru_cache
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state
from matplotlib.ticker import EngFormatter, MaxNLocator

from mica.cli.output import one_line, write_file

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
_INK, _FAINT = "#333333", "#D9D9D9"


def write_curve(history: list[dict], output: Path) -> None:
    """Write ``output``/curve.csv and curve.png; ``history`` is the Trainer's ``state.log_history``.

    On the main process. Each file is renamed into place, so that a running job can be watched. Whatever
    fails is one warning on stderr (the same only once) and never ends a run.
    """
    try:
        rows = table(history)
        if not rows:
            return
        write_file("--output", output / "curve.csv", lambda path: _write_csv(rows, path))
        drawn = figure(rows, output.resolve().name)
        write_file("--output", output / "curve.png", lambda path: drawn.savefig(path, format="png"))
    except Exception as error:  # the training is worth more than its picture
        _warn(f"mica adapt: warning: no curve: {one_line(error)}")


@lru_cache
def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def table(history: list[dict]) -> list[dict]:
    """One row per logged or evaluated step, in order: the keys of `COLUMNS` -> number or None."""
    rows: dict[int, dict] = {}
    for entry in history:
        found = {column: entry[name] for column, name in COLUMNS.items() if entry.get(name) is not None}
        if found.keys() & {"loss", "held_out_perplexity", "retain_perplexity"}:
            rows.setdefault(entry["step"], dict.fromkeys(COLUMNS)).update(found)
    return [rows[step] for step in sorted(rows)]


def _write_csv(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(rows)


def figure(rows: list[dict], name: str) -> Figure:
    """Training loss above, perplexities below, over the optimiser steps; tokens along the upper edge.

    ``rows``: see `table`. A quantity that was never measured is left out; without any perplexity there is
    one panel. Lines have the gid of their column.
    """
    measured = [key for key in _LABELS if any(row[key] is not None for row in rows)]
    count = 2 if measured else 1
    drawing = Figure(figsize=(7, 1.2 + 2.4 * count), dpi=150, layout="constrained")
    panels = drawing.subplots(count, 1, sharex=True, squeeze=False).flatten()
    _line(panels[0], rows, "loss", None)
    panels[0].set_ylabel("training loss (nats per token)", fontsize=9, color=_INK)
    for key in measured:
        _line(panels[1], rows, key, _LABELS[key])
    if measured:
        panels[1].set_ylabel("perplexity", fontsize=9, color=_INK)
        panels[1].legend(frameon=False, fontsize=9, labelcolor=_INK)
    for axes in panels:
        axes.grid(color=_FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", labelsize=8, colors=_INK, length=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_FAINT)
    panels[-1].set_xlabel("optimiser step", fontsize=9, color=_INK)
    _add_tokens(panels[0], rows)
    drawing.suptitle(name, fontsize=12, color=_INK)
    return drawing


def _line(axes, rows: list[dict], key: str, label: str | None) -> None:
    points = [(row["step"], row[key]) for row in rows if row[key] is not None]
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "o" if len(steps) <= 40 else None
    axes.plot(
        steps, values, color=_COLOURS[key], linewidth=1.2, marker=marker, markersize=3, label=label, gid=key
    )


def _add_tokens(axes, rows: list[dict]) -> None:
    """An axis of tokens: blocks are full, so that they go with the steps."""
    step, tokens = next(
        ((row["step"], row["tokens"]) for row in reversed(rows) if row["step"] and row["tokens"]), (0, 0)
    )
    if not tokens:
        return
    each = tokens / step
    upper = axes.secondary_xaxis("top", functions=(lambda x: x * each, lambda x: x / each))
    upper.set_xlabel("tokens", fontsize=9, color=_INK)
    upper.xaxis.set_major_formatter(EngFormatter(sep=""))
    upper.tick_params(labelsize=8, colors=_INK, length=0)
    upper.spines["top"].set_visible(False)
