"""What was learned by what was forgotten, a curve a method."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state

from mica.cli.plot import STYLE

# Distinct from each other for all common kinds of colour blindness, and in grey.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#A66BBE", "#56B4E9", "#333333")
_DASHES = ("-", "--", ":")


def trade_off(
    curves: dict[str, Sequence[tuple[float, float]]], path: Path, title: str, x_label: str, y_label: str
) -> None:
    """Write a PNG. ``curves``: name -> points (x, y)."""
    with rc_context({**STYLE, "lines.linewidth": 1.4, "lines.markersize": 3}):
        figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
        for number, (name, points) in enumerate(curves.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, dashes, marker="o", color=colour, label=name)
        if curves:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, format="png", metadata={"Software": None})
