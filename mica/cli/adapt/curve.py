"""The course of a run as ``curve.png``, drawn at its end."""

import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state
from matplotlib.ticker import EngFormatter, MaxNLocator

from mica.cli.output import one_line, shown, write_file
from mica.cli.plot import STYLE

# What is drawn, by its name in the Trainer's log_history. Distinct from each other for all common kinds of
# colour blindness, and in grey.
_COLOURS = {"loss": "#0072B2", "eval_held_out_perplexity": "#D55E00", "eval_retain_perplexity": "#009E73"}
_LABELS = {"eval_held_out_perplexity": "held out", "eval_retain_perplexity": "to be retained"}
_MARKED = 40  # points of a line at most for it to have markers


def draw(history: list[dict], output: Path) -> None:
    """Write ``output``/curve.png; ``history`` is the Trainer's ``state.log_history``.

    Whatever fails is a warning on stderr: the training is worth more than its picture.
    """
    try:
        with rc_context({**STYLE, "lines.linewidth": 1.2, "lines.markersize": 3}):
            drawing = figure(history, shown(output.resolve().name))
            write_file("--output", output / "curve.png", lambda path: drawing.savefig(path, format="png"))
    except Exception as error:
        print(f"mica adapt: warning: no curve: {one_line(error)}", file=sys.stderr)


def figure(history: list[dict], name: str) -> Figure:
    """Training loss above, perplexities below, over the optimiser steps; tokens along the upper edge.

    A quantity that was never measured is left out; without any perplexity there is one panel. Lines have the
    gid of what they show.
    """
    points = {key: [(entry["step"], entry[key]) for entry in history if key in entry] for key in _COLOURS}
    has_perplexity = any(points[key] for key in _LABELS)
    count = 2 if has_perplexity else 1
    drawing = Figure(figsize=(7, 1.2 + 2.4 * count), dpi=150, layout="constrained")
    panels = drawing.subplots(count, 1, sharex=True, squeeze=False).flatten()

    for key, measured in points.items():
        if measured:
            panel = panels[1] if key in _LABELS else panels[0]
            _plot(panel, key, measured)

    panels[0].set_ylabel("training loss (nats per token)")
    if has_perplexity:
        panels[1].set_ylabel("perplexity")
        panels[1].legend()
    panels[-1].set_xlabel("optimiser step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))  # which the panels share
    _add_token_axis(panels[0], history)
    drawing.suptitle(name, parse_math=False)
    return drawing


def _plot(panel: Axes, key: str, measured: list[tuple[int, float]]) -> None:
    steps, values = zip(*measured, strict=True)
    marker = "o" if len(measured) <= _MARKED else None
    panel.plot(steps, values, label=_LABELS.get(key), color=_COLOURS[key], marker=marker, gid=key)


def _add_token_axis(panel: Axes, history: list[dict]) -> None:
    """Tokens along the upper edge. Blocks are full, so that tokens are proportional to steps."""
    ratios = [entry["num_input_tokens_seen"] / entry["step"] for entry in history if "loss" in entry]
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
