"""What was learned by what was forgotten, a point a method."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state

from mica.cli.compare.methods import METHODS
from mica.cli.plot import STYLE

# Distinct from each other for all common kinds of colour blindness, and in grey.
_COLOURS = dict(zip(METHODS, ("#D55E00", "#0072B2", "#A66BBE", "#009E73"), strict=True))

_APART = 0.07  # names, as a part of the height


def trade_off(report: dict[str, Any], path: Path) -> None:
    """Write a PNG of the methods of ``report``, however much is forgotten; small: their other trainings.

    A bar is the interval of the difference to the best, whose line it reaches where that may be chance.
    """
    rows = report["any"]["methods"]
    with rc_context({**STYLE, "lines.linewidth": 1.2}):
        figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot(
            title="Better: up and left. Bars: 95 % interval of the difference to the best",
            xlabel="forgotten of the retained text, nats per token",
            ylabel="learned of held-out text, nats per token",
        )
        for method, points in report["points"].items():
            axes.scatter(*zip(*points, strict=True), s=9, color=_COLOURS[method], alpha=0.45, linewidths=0)
        for row in rows:
            half = row["behind"] and row["behind"]["half"]
            at = row["forgotten"], row["learned"]
            axes.errorbar(*at, yerr=half or 0, fmt="o", color=_COLOURS[row["method"]], capsize=3)
        if rows:
            axes.axhline(rows[0]["learned"], color="#999999", linestyle="--", linewidth=0.8)
        limit = report["equal"]["limit"]
        if limit:
            axes.axvline(limit, color="#999999", linestyle=":", linewidth=0.8)
            where = {"xycoords": ("data", "axes fraction"), "ha": "right", "color": "#666666"}
            axes.annotate("equal forgetting ", (limit, 0.01), fontsize=8, **where)
        axes.margins(0.08)
        _fit(axes, [learned for points in report["points"].values() for _, learned in points])
        _name(axes, rows)
        figure.savefig(path, format="png", metadata={"Software": None})


def _fit(axes, learned: list[float]) -> None:
    """Show all points; a bar of few seeds may be many times as long, and is cut off."""
    if learned:
        room = 0.2 * (max(learned) - min(learned)) or 0.1
        axes.set_ylim(min(learned) - room, max(learned) + room)


def _name(axes, rows: list[dict[str, Any]]) -> None:
    """Names of the methods, the best first, right of the axes, each with a line to its point."""
    low, high = axes.get_ylim()
    ceiling = 1.0
    for row in rows:
        height = min(ceiling, (row["learned"] - low) / (high - low))
        ceiling = height - _APART
        axes.annotate(
            METHODS[row["method"]].title,
            (row["forgotten"], row["learned"]),
            (1.02, height),
            textcoords="axes fraction",
            color=_COLOURS[row["method"]],
            va="center",
            arrowprops={"arrowstyle": "-", "color": _COLOURS[row["method"]], "linewidth": 0.4},
        )
