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

    A bar is the interval of the difference to the best, whose line it reaches where that may be chance. One
    of few seeds may be many times as long as all that was learned, and is cut off.
    """
    with rc_context({**STYLE, "lines.linewidth": 1.2}):
        figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot(
            title="Better: up and left. Bars: 95 % interval of the difference to the best",
            xlabel="forgotten of the retained text, nats per token",
            ylabel="learned of held-out text, nats per token",
        )
        axes.margins(0.1)
        for method, points in report["points"].items():
            axes.scatter(*zip(*points, strict=True), s=9, color=_COLOURS[method], alpha=0.45, linewidths=0)
        axes.set_ylim(axes.get_ylim())
        for row in report["any"]["methods"]:
            at = row["forgotten"], row["learned"]
            half = row["behind"] and row["behind"]["half"]
            look = {"color": _COLOURS[row["method"]], "label": METHODS[row["method"]].title}
            axes.errorbar(*at, yerr=half or 0, fmt="o", capsize=3, **look)
            if row["behind"] is None:
                axes.axhline(row["learned"], color="#999999", linestyle="--", linewidth=0.8)
        limit = report["equal"]["limit"]
        if limit:
            axes.axvline(limit, color="#999999", linestyle=":", label="equal forgetting")
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside right upper")
        figure.savefig(path, format="png", metadata={"Software": None})
