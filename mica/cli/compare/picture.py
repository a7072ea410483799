"""What was learned by what was forgotten, a point a method."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state

from mica.cli.compare.methods import METHODS
from mica.cli.plot import STYLE

# Distinct from each other for all common kinds of colour blindness, and in grey.
_COLOURS = dict(zip(METHODS, ("#D55E00", "#0072B2", "#A66BBE", "#009E73"), strict=True))


def trade_off(report: dict[str, Any], path: Path) -> None:
    """Write a PNG of the methods of ``report``, however much is forgotten; small: their other trainings.

    A bar is the interval of the difference to the best, whose line it reaches where that may be chance.
    """
    rows = report["any"]["methods"]
    with rc_context({**STYLE, "lines.linewidth": 1.2}):
        figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot(
            title="Learned, by what was forgotten (better: up and left)",
            xlabel="forgotten of the retained text, nats per token",
            ylabel="learned of held-out text, nats per token",
        )
        for method, points in report["points"].items():
            axes.scatter(*zip(*points, strict=True), s=9, color=_COLOURS[method], alpha=0.45, linewidths=0)
        for row in rows:
            _draw(axes, row)
        if rows:
            axes.axhline(rows[0]["learned"], color="#999999", linestyle="--", linewidth=0.8)
        limit = report["equal"]["limit"]
        if limit:
            axes.axvline(limit, color="#999999", linestyle=":", linewidth=0.8)
            axes.annotate(
                "equal forgetting ",
                (limit, 0.01),
                xycoords=("data", "axes fraction"),
                ha="right",
                fontsize=8,
                color="#666666",
            )
        axes.margins(0.12, 0.12)
        figure.savefig(path, format="png", metadata={"Software": None})


def _draw(axes, row: dict[str, Any]) -> None:
    """A method's point with its name and the interval of its difference to the best."""
    colour = _COLOURS[row["method"]]
    at = row["forgotten"], row["learned"]
    axes.plot(*at, "o", markersize=6, color=colour)
    half = row["behind"] and row["behind"]["half"]
    if half:
        axes.errorbar(*at, yerr=half, color=colour, capsize=3)
    title = METHODS[row["method"]].title
    axes.annotate(title, at, (7, 4), textcoords="offset points", color=colour, fontsize=9)
