"""What was learned over what was forgotten: a curve a method, a point a learning rate."""

from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state

from mica.cli.compare.methods import METHODS
from mica.cli.compare.outcomes import Found

_STYLES = ("seaborn-v0_8-whitegrid", "seaborn-v0_8-colorblind", {"axes.titlesize": "medium"})
_LOOKS = {  # by method: also distinct in grey
    method: {"color": f"C{number}", "marker": marker}
    for number, (method, marker) in enumerate(zip(METHODS, "osD^", strict=True))
}


def trade_off(found: dict[str, Found], path: Path) -> None:
    """Write a PNG of the curve of each method, and each seed at the learning rate that was chosen."""
    with style.context(_STYLES):
        figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
        axes = figure.add_subplot(
            title="Beside a point: its learning rate. Large: all seeds at the one that was chosen",
            xlabel="forgotten of the retained text, nats per token",
            ylabel="learned of the test text, nats per token",
        )
        axes.margins(0.12)
        for method, one in found.items():
            look = _LOOKS[method]
            for rate, end in one.curve.items():
                learned, forgotten = end.means
                at = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8}
                axes.annotate(f"{rate:g}", (forgotten, learned), color=look["color"], **at)
            learned, forgotten = zip(*(end.means for end in one.curve.values()), strict=True)
            axes.plot(forgotten, learned, label=METHODS[method].title, **look)
            learned, forgotten = one.each.T
            axes.plot(forgotten, learned, linestyle="", markersize=8, alpha=0.6, **look)
        figure.legend(loc="outside right upper")
        figure.savefig(path, format="png", metadata={"Software": None})
