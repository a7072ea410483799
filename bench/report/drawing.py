"""How the benchmarks' pictures look: SVG that reads on white and on dark pages, and repeats byte by byte.

The background is transparent. Text is drawn as paths, since a page's fonts are not known.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display and no global state
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from bench.results.names import ATEN, BARE, COMPILED, FAST, GROUPED, LORA, STOCK, STOCK_16, UNGROUPED
from bench.results.schema import Ratio

PAGES = "#ffffff", "#0d1117"  # GitHub's light and dark
INK = "#7a7a7a"  # as far from the one as from the other
# Okabe and Ito's hues, as dark as both pages allow. One hue is one software, its variants differ in dashes.
OURS, PEFT, PLAIN, OTHER, VIOLET = "#D55E00", "#1F7FC4", INK, "#008F6B", "#A66BBE"


class Style(NamedTuple):
    colour: str
    dashes: str = "-"
    marker: str = "o"


_STYLES = {
    FAST: Style(OURS),
    GROUPED: Style(OURS),
    UNGROUPED: Style(OURS, "--", "s"),
    STOCK: Style(PEFT),
    STOCK_16: Style(PEFT, "--", "s"),
    COMPILED: Style(PEFT, ":", "^"),
    LORA: Style(OTHER),
    ATEN: Style(VIOLET, "--", "D"),
    BARE: Style(PLAIN, ":", "s"),
}


def style(rival: str) -> Style:
    if rival.startswith("minor_subspace"):
        return Style(OURS if "auto" in rival or "," not in rival else VIOLET)
    return _STYLES.get(rival, Style(PLAIN, "--", "v"))


class Line(NamedTuple):
    name: str
    points: dict[int, Ratio]


class Bar(NamedTuple):
    name: str
    value: Ratio
    text: str


def settled(draw: Callable) -> Callable:
    """Whatever the user's matplotlibrc says."""
    settings = {
        "font.family": "DejaVu Sans",  # matplotlib brings it along
        "font.size": 9,
        "svg.fonttype": "path",
        "svg.hashsalt": "mica",
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }

    @wraps(draw)
    def wrapped(*args, **kwargs):
        with matplotlib.rc_context(settings):
            return draw(*args, **kwargs)

    return wrapped


def blank(width: float, height: float, title: str, subtitle: str = "") -> tuple[Figure, Axes]:
    """Inches. The subtitle says what is fixed."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_title(title + (f"\n{subtitle}" if subtitle else ""), fontsize=9.5, color=INK, loc="left", pad=8)
    axes.grid(color=INK, alpha=0.35, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


# Half the size: no comments and indents, hundredths of a point, and a glyph's use in fewer words.
_SHORTER = {
    r"\s*<!--.*?-->|(?<=\n) +": "",
    r"\b([1-9]\d*\.\d\d)\d+": r"\1",
    r"DejaVuSans-": "g",
    r'(<use [^>]*)transform="translate\(([\d.]+) 0\)"': r'\1x="\2"',
}


def save(figure: Figure, path: Path) -> Path:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    short = text.getvalue()
    for pattern, shorter in _SHORTER.items():
        short = re.sub(pattern, shorter, short, flags=re.DOTALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(short, encoding="utf-8", newline="\n")
    return path


def plain_ticks(axis, values: Iterable[float] | None = None) -> None:
    """1024, not 10^3, on a logarithmic axis; at these values only, or at powers of ten."""
    if values is not None:
        axis.set_ticks(list(values))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def lines(axes: Axes, series: list[Line], unit: str) -> None:
    """Over a logarithmic axis of the values measured; intervals as bands; names at the right-hand ends."""
    axes.set_xscale("log")
    for i, (name, points) in enumerate(series):
        look, values = style(name), sorted(points)
        middle, low, high = zip(*(points[value] for value in values), strict=True)
        drawn = {"color": look.colour, "linewidth": 2.0 if look.colour == OURS else 1.4}
        axes.plot(values, middle, look.dashes, marker=look.marker, markersize=4, gid=f"series-{i}", **drawn)
        axes.fill_between(values, low, high, color=look.colour, alpha=0.18, linewidth=0, gid=f"interval-{i}")
    every = sorted({value for _, points in series for value in points})
    plain_ticks(axes.xaxis, every)
    numbers = [number for _, points in series for ratio in points.values() for number in ratio]
    if min(numbers) > 0 and max(numbers) > 30 * min(numbers):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plain_ticks(axes.yaxis)
    else:
        axes.set_ylim(min(0, *numbers), 1.05 * max(numbers))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    _name_ends(axes, series)


def _name_ends(axes: Axes, series: list[Line], gap: float = 0.065) -> None:
    """At the height of the last point, pushed apart to ``gap`` of the axes' height for a line of text."""
    to_axes = axes.transScale + axes.transLimits
    ends = []
    for name, points in series:
        last = max(points)
        text = name.replace(", adapters in", ",\nadapters in")
        ends.append((float(to_axes.transform((last, points[last].median))[1]), text, style(name).colour))
    ends.sort()
    heights = [height for height, *_ in ends]
    lines = [1 + text.count("\n") for _, text, _ in ends]
    gaps = [gap * (a + b) / 2 for a, b in pairwise(lines)]
    for i, apart in enumerate(gaps):
        heights[i + 1] = max(heights[i + 1], heights[i] + apart)
    heights[-1] = min(heights[-1], 1.0)
    for i, apart in reversed(list(enumerate(gaps))):
        heights[i] = min(heights[i], heights[i + 1] - apart)
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            text,
            (1, height),
            xytext=(8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )


def bars(axes: Axes, clusters: dict[str, list[Bar]], thick: float = 0.8, from_one: bool = False) -> None:
    """Horizontal, the first on top, a cluster's name at its middle and a bar's text at its end.

    ``from_one``: of factors, over a logarithmic axis; bars of factors below 1 go to the left.
    """
    position, ticks, count = 0.0, [], 0
    furthest = max(bar.value.high for cluster in clusters.values() for bar in cluster)
    for cluster in clusters.values():
        start = position
        for bar in cluster:
            colour = style(bar.name).colour
            middle, low, high = bar.value
            left, width = (1.0, middle - 1.0) if from_one else (0.0, middle)
            (bar_drawn,) = axes.barh(position, width, thick, left=left, color=colour, linewidth=0)
            bar_drawn.set_gid(f"series-{count}")
            if high > low:
                axes.plot([low, high], [position] * 2, color=INK, linewidth=1.2, gid=f"interval-{count}")
            axes.annotate(
                bar.text,
                (max(high, left), position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=colour,
                annotation_clip=False,
            )
            position, count = position + 1, count + 1
        ticks.append((start + position - 1) / 2)
        position += 0.6
    axes.set_yticks(ticks, list(clusters))
    axes.set_ylim(position - 0.9, -0.7)
    if from_one:
        nearest = min(bar.value.low for cluster in clusters.values() for bar in cluster)
        axes.set(xscale="log", xlim=(0.8 * min(nearest, 1.0), 1.3 * furthest))
        plain_ticks(axes.xaxis)
    else:
        axes.set_xlim(0, 1.02 * furthest)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(visible=False)  # the numbers are written there
    axes.spines["bottom"].set_visible(False)
