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
    """Write a PNG of the methods of ``report`` at equal forgetting; small: all their trainings, whole.

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
        for row in report["methods"]:
            look = {"color": _COLOURS[row["method"]], "label": METHODS[row["method"]].title}
            axes.plot(row["forgotten"], row["learned"], "o", **look)
        axes.set_ylim(axes.get_ylim())
        for row in report["methods"]:
            if row["behind"] and row["behind"]["half"]:
                at = {"x": row["forgotten"], "y": row["learned"], "yerr": row["behind"]["half"]}
                axes.errorbar(**at, capsize=3, color=_COLOURS[row["method"]])
        if report["methods"]:
            axes.axhline(report["methods"][0]["learned"], color="#999999", linestyle="--", linewidth=0.8)
            axes.axvline(report["limit"], color="#999999", linestyle=":", label="equal forgetting")
            figure.legend(loc="outside right upper")
        figure.savefig(path, format="png", metadata={"Software": None})
