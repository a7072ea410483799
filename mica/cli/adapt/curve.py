"""The course of a run as ``curve.csv`` and ``curve.png``, written anew after each evaluation."""

import sys
from functools import lru_cache
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
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
_MARKED = 40  # points of a line at most for it to have markers
_print_once = lru_cache(print)


def write_curve(history: list[dict], output: Path) -> None:
    """Write ``output``/curve.csv and curve.png; ``history`` is the Trainer's ``state.log_history``.

    On the main process. Each file is renamed into place, so that a running job can be watched. Whatever
    fails is one warning on stderr (the same only once) and never ends a run.
    """
    try:
        rows = table(history)
        if not rows:
            return
        text = _as_csv(rows)
        record.claimed(output, "curve.csv", lambda path: path.write_text(text, encoding="utf-8"))
        with rc_context({**STYLE, "lines.linewidth": 1.2, "lines.markersize": 3}):
            drawing = figure(rows, shown(output.resolve().name))
            record.claimed(output, "curve.png", lambda path: drawing.savefig(path, format="png"))
    except Exception as error:  # the training is worth more than its picture
        _print_once(f"mica adapt: warning: no curve: {one_line(error)}", file=sys.stderr)


def table(history: list[dict]) -> list[dict]:
    """One row per logged or evaluated step, in order: the keys of `COLUMNS` -> number or None."""
    rows: dict[int, dict] = {}
    for entry in history:
        found = {column: entry[name] for column, name in COLUMNS.items() if entry.get(name) is not None}
        if found.keys() & _COLOURS.keys():
            row = rows.setdefault(entry["step"], dict.fromkeys(COLUMNS))
            row.update(found)
    return [rows[step] for step in sorted(rows)]


def _as_csv(rows: list[dict]) -> str:
    lines = [",".join(COLUMNS)]
    for row in rows:
        lines.append(",".join(_cell(value) for value in row.values()))
    return "".join(f"{line}\n" for line in lines)


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value)


def figure(rows: list[dict], name: str) -> Figure:
    """Training loss above, perplexities below, over the optimiser steps; tokens along the upper edge.

    ``rows``: see `table`. A quantity that was never measured is left out; without any perplexity there is
    one panel. Lines have the gid of their column.
    """
    points = {column: _points(rows, column) for column in _COLOURS}
    has_perplexity = any(points[column] for column in _LABELS)
    count = 2 if has_perplexity else 1
    drawing = Figure(figsize=(7, 1.2 + 2.4 * count), dpi=150, layout="constrained")
    panels = drawing.subplots(count, 1, sharex=True, squeeze=False).flatten()

    for column, measured in points.items():
        if measured:
            panel = panels[1] if column in _LABELS else panels[0]
            _plot(panel, column, measured)

    panels[0].set_ylabel("training loss (nats per token)")
    if has_perplexity:
        panels[1].set_ylabel("perplexity")
        panels[1].legend()
    panels[-1].set_xlabel("optimiser step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))  # which the panels share
    _add_token_axis(panels[0], rows)
    drawing.suptitle(name, parse_math=False)
    return drawing


def _points(rows: list[dict], column: str) -> list[tuple[int, float]]:
    """(step, value) where ``column`` was measured."""
    return [(row["step"], row[column]) for row in rows if row[column] is not None]


def _plot(panel: Axes, column: str, measured: list[tuple[int, float]]) -> None:
    steps, values = zip(*measured, strict=True)
    marker = "o" if len(measured) <= _MARKED else None
    panel.plot(steps, values, label=_LABELS.get(column), color=_COLOURS[column], marker=marker, gid=column)


def _add_token_axis(panel: Axes, rows: list[dict]) -> None:
    """Tokens along the upper edge. Blocks are full, so that tokens are proportional to steps."""
    ratios = [row["tokens"] / row["step"] for row in rows if row["step"] and row["tokens"]]
    if not ratios:
        return
    tokens_per_step = ratios[-1]

    def to_tokens(step):
        return step * tokens_per_step

    def to_steps(tokens):
        return tokens / tokens_per_step

    upper = panel.secondary_xaxis("top", functions=(to_tokens, to_steps))
    upper.set_xlabel("tokens")
    upper.xaxis.set_major_formatter(EngFormatter(sep=""))
