"""How the pictures look: SVG that reads on light and dark pages, reproducible byte by byte.

The background is transparent. Text is drawn as paths, since a page's fonts are not known.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display and no global state
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.results.names import ATEN, COMPILED, FAST, LORA, STOCK, STOCK_16
from bench.results.schema import Ratio

INK = "#7a7a7a"  # as far from GitHub's light page as from its dark one
# Okabe and Ito's hues, as dark as both pages allow. One hue is one software, its variants differ in dashes.
OURS, PEFT, OTHER, VIOLET = "#D55E00", "#1F7FC4", "#008F6B", "#A66BBE"
STYLES = {  # colour, dashes, marker
    FAST: (OURS, "-", "o"),
    STOCK: (PEFT, "-", "o"),
    STOCK_16: (PEFT, "--", "s"),
    COMPILED: (PEFT, ":", "^"),
    LORA: (OTHER, "-", "o"),
    ATEN: (VIOLET, "--", "D"),
}
SETTINGS = {  # override the user's matplotlibrc
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "mica",
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys([f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")], 0),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.titlelocation": "left", "axes.titlesize": 9.5, "axes.axisbelow": True, "axes.grid": True},
    **{"grid.color": INK, "grid.alpha": 0.35, "grid.linewidth": 0.5, "legend.labelcolor": "linecolor"},
}


def blank(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """Inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(title=title)


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return path


def _plain(axis, values: Iterable[float] | None = None, unit: str = "") -> None:
    """1024, not 10^3, on a logarithmic axis; at these values only, or where it has ticks."""
    if values is not None:
        axis.set_ticks(list(values))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_formatter(NullFormatter())


def _finite(ratio: Ratio) -> Ratio:
    """One round has no interval: none is drawn."""
    return ratio if ratio.high < inf else Ratio(ratio.median, ratio.median, ratio.median)


def lines(axes: Axes, series: dict[str, dict[int, Ratio]], unit: str) -> None:
    """Over a logarithmic axis of the measured values; intervals as bands; legend ordered by line ends."""
    axes.set_xscale("log")
    series = {
        name: {value: _finite(ratio) for value, ratio in points.items()} for name, points in series.items()
    }
    ordered = sorted(series.items(), key=lambda one: -one[1][max(one[1])].median)
    for i, (name, points) in enumerate(ordered):
        colour, dashes, marker = STYLES.get(name, (INK, "--", "v"))
        middle, low, high = zip(*(points[value] for value in sorted(points)), strict=True)
        width = 2.0 if colour == OURS else 1.4
        drawn = {"color": colour, "linewidth": width, "markersize": 4, "label": name, "gid": f"series-{i}"}
        axes.plot(sorted(points), middle, dashes, marker=marker, **drawn)
        drawn = {"color": colour, "alpha": 0.18, "linewidth": 0, "gid": f"interval-{i}"}
        axes.fill_between(sorted(points), low, high, **drawn)
    numbers = [number for points in series.values() for ratio in points.values() for number in ratio]
    if min(numbers) > 0 and max(numbers) > 30 * min(numbers):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_ylim(min(0, *numbers), 1.05 * max(numbers))
    _plain(axes.xaxis, sorted({value for points in series.values() for value in points}))
    _plain(axes.yaxis, unit=unit)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def bars(axes: Axes, factors: dict[str, Ratio]) -> None:
    """Speedups on a logarithmic axis: bars start at 1, to the left where below it, the first on top."""
    factors = {name: _finite(ratio) for name, ratio in factors.items()}
    for i, (middle, low, high) in enumerate(factors.values()):
        (bar,) = axes.barh(i, middle - 1, left=1, color=OURS, linewidth=0)
        bar.set_gid(f"series-{i}")
        axes.plot([low, high], [i, i], color=INK, linewidth=1.2, gid=f"interval-{i}")
        text = f"{middle:.2f}×" if middle < 10 else f"{middle:.0f}×"
        place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (max(high, 1), i), color=OURS, **place)
    axes.set_yticks(range(len(factors)), factors)
    axes.set_ylim(len(factors) - 0.3, -0.7)
    ends = min(1.0, *(low for _, low, _ in factors.values())), max(high for *_, high in factors.values())
    axes.set(xscale="log", xlim=(0.8 * ends[0], 1.3 * ends[1]))
    _plain(axes.xaxis)
    axes.axvline(1, color=INK, linewidth=1, zorder=0)
    axes.grid(visible=False)  # the bars are labelled
    axes.spines["bottom"].set_visible(False)
