"""Pictures of one run: one idea each, and none for suites that the run does not have.

PNG with a transparent background and grey text, which reads on light and dark pages; reproducible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display and no global state
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.report.cells import by_clock, clocks, having, ratio
from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.names import ATEN, BARE, BOTH, DEVICE_TIME, FAST, LORA, STOCK, STOCK_16, WALL
from bench.results.schema import Result

INK = "#7a7a7a"  # as far from GitHub's light page as from its dark one
# Okabe and Ito's hues, as dark as both pages allow. One hue is one software, its variants differ in dashes.
OURS, PEFT, OTHER, VIOLET = "#D55E00", "#1F7FC4", "#008F6B", "#A66BBE"
STYLES = {  # colour, dashes, marker
    FAST: (OURS, "-", "o"),
    STOCK: (PEFT, "-", "o"),
    STOCK_16: (PEFT, "--", "s"),
    names.COMPILED: (PEFT, ":", "^"),
    names.COMPILED_FAST: (OURS, ":", "^"),
    names.COMPILED_PLAIN: (OURS, ":", "v"),
    names.AUTOCAST: (PEFT, "-.", "v"),
    names.AUTOCAST_FAST: (OURS, "-.", "v"),
    LORA: (OTHER, "-", "o"),
    ATEN: (VIOLET, "--", "D"),
}
SETTINGS = {  # override the user's matplotlibrc
    **{"font.family": "DejaVu Sans", "font.size": 8.5, "savefig.dpi": 144},  # the font comes with matplotlib
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys([f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")], 0),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.titlelocation": "left", "axes.titlesize": 9.5, "axes.axisbelow": True, "axes.grid": True},
    **{"grid.color": INK, "grid.alpha": 0.35, "grid.linewidth": 0.5, "legend.labelcolor": "linecolor"},
}
MIN_POINTS = 3  # of a line
# suite -> its name in the picture: what is done once, then what every step does
AGAINST_STOCK = {
    "initialisation": "initialisation",
    "loading": "loading an adapter",
    "merge": "merge and unmerge",
    "step": "training step",
    "block": "one block, forward + backward",
    "generation": "generate(), adapter unmerged",
}


def draw(result: Result, folder: Path, stem: str) -> list[tuple[Path, str]]:
    """Writes ``folder/stem-….png``; returns each file with a sentence that says what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    with matplotlib.rc_context(SETTINGS):
        for name, figure, caption in figures(result):
            pictures.append((folder / f"{stem}-{name}.png", caption))
            figure.savefig(pictures[-1][0], metadata={"Software": None})
    return pictures


def figures(result: Result) -> Iterator[tuple[str, Figure, str]]:
    """Ending of the file's name, figure, caption."""
    result = result.with_both()
    yield from _overhead(by_clock(result, DEVICE_TIME if DEVICE_TIME in clocks(result) else WALL))
    yield from _against_stock(by_clock(result, WALL))


def families(groups: Iterable[Group]) -> list[dict[int, Group]]:
    """Cells that differ in their number of tokens only: tokens -> cell."""
    by_axes: dict[tuple, dict[int, Group]] = {}
    for group in sorted(groups, key=lambda one: one.axes["tokens"]):
        others = {name: value for name, value in group.axes.items() if name != "tokens"}
        by_axes.setdefault(tuple(sorted(others.items())), {})[group.axes["tokens"]] = group
    return [*by_axes.values()]


def described(axes: dict[str, str | int]) -> str:
    """The axes in words, without suite and pass."""
    shown = {name: value for name, value in axes.items() if name not in ("suite", "pass")}
    words = [str(shown.pop("model"))] if "model" in shown else []
    if {"out", "in"} <= shown.keys():
        words.append(f"{shown.pop('out')} × {shown.pop('in')}")
    for name, value in shown.items():
        counted, plain = name == "tokens", name in ("dtype", "clock")
        words.append(f"{value} {name}" if counted else str(value) if plain else f"{name} {value}")
    return ", ".join(words)


def _overhead(result: Result) -> Iterator[tuple[str, Figure, str]]:
    """Of the layer that was timed with the most numbers of tokens, the first if several."""
    layers = having({BARE}, result.select(suite="layer", **{"pass": BOTH}))
    family = max(families(layers), key=len, default={})
    points: dict[str, dict[int, Ratio]] = {}
    for tokens, group in family.items():
        for name in group.timings:
            percent = Ratio(*(100 * (number - 1) for number in group.ratio(name, BARE)))
            points.setdefault(name, {})[tokens] = percent
    series = {name: line for name, line in points.items() if len(line) > 1 and name != BARE}
    if len(family) < MIN_POINTS or not series:
        return
    at = described({name: value for name, value in group.axes.items() if name != "tokens"})
    title = f"Time over the bare frozen layer, forward + backward\n{at}"
    figure, axes = _blank(8.6, 3.6, title)
    lines(axes, series, " %")
    axes.set_xlabel("tokens in the batch (log)")
    axes.set_ylabel("% over the bare layer" + (" (log)" if axes.get_yscale() == "log" else ""))
    caption = f"What an adapter adds to the time of a frozen linear layer ({at}), by tokens in the batch"
    if ours := points.get(FAST):
        ends = " and ".join(f"{ours[tokens].median:.0f} % at {tokens}" for tokens in (min(ours), max(ours)))
        caption += f": {FAST} {ends} (bands: intervals of the median over the rounds)"
    yield "overhead-by-tokens", figure, caption + "."


def _against_stock(result: Result) -> Iterator[tuple[str, Figure, str]]:
    factors = {}
    for suite, what in AGAINST_STOCK.items():
        for group in result.select(suite=suite):
            if (faster := ratio(group, STOCK, FAST)) is not None:
                factors[f"{what}\n{described(group.axes)}"] = faster
    if not factors:
        return
    figure, axes = _blank(7.2, 0.9 + 0.42 * len(factors), "Times faster than stock PEFT")
    bars(axes, factors)
    axes.set_xlabel("times faster (log; 1: as fast as stock PEFT)")
    caption = "What a user waits for, as times faster than stock PEFT (lines: intervals of the median)."
    yield "against-stock", figure, caption


def energy(profiles: dict[str, list[float]], path: Path) -> None:
    """``profiles``: title -> energy along each tenth of the singular directions, largest first, over that
    along as many random ones. Writes the picture."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _blank(7.2, 3.2, "Where updates lie, by the singular values of the weight")
        for (name, values), colour in zip(profiles.items(), (VIOLET, PEFT, OTHER), strict=True):
            axes.plot(range(1, len(values) + 1), values, "-", marker="o", color=colour, label=name)
        axes.axhline(1, color=INK, linewidth=1)
        axes.set(yscale="log", xlabel="tenth of the left singular vectors: 1 the largest, 10 the smallest")
        axes.set_ylabel("energy, random directions: 1 (log)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        _plain(axes.xaxis, range(1, 11))
        _plain(axes.yaxis)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, metadata={"Software": None})


def trade_off(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """``curves``: method -> (forgotten in nats, new facts right in %). Writes the picture."""
    hues = {"MiCA": OURS, "LoRA": PEFT, "frozen": OTHER, "full": VIOLET}
    marks, seen = "osD^v", Counter()
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _blank(8.6, 4.2, "New facts learned, by what was forgotten for them")
        for name, points in curves.items():
            kind = name.split()[0].rstrip(",")
            dashes = ":" if "by the paper" in name else "-"
            drawn = {"color": hues.get(kind, INK), "marker": marks[seen[kind] % len(marks)], "label": name}
            axes.plot(*zip(*points, strict=True), dashes, markersize=4, linewidth=1.4, **drawn)
            seen[kind] += 1
        axes.set(xlabel="forgotten, nats per token", ylabel="new facts right, %")
        axes.set_ylim(0, 100)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, metadata={"Software": None})


def _blank(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """Inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(title=title)


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
    for name, points in sorted(series.items(), key=lambda one: -one[1][max(one[1])].median):
        colour, dashes, marker = STYLES.get(name, (INK, "--", "v"))
        middle, low, high = zip(*(_finite(points[value]) for value in sorted(points)), strict=True)
        width = 2.0 if colour == OURS else 1.4
        drawn = {"color": colour, "linewidth": width, "markersize": 4, "label": name}
        axes.plot(sorted(points), middle, dashes, marker=marker, **drawn)
        axes.fill_between(sorted(points), low, high, color=colour, alpha=0.18, linewidth=0)
    numbers = [number for points in series.values() for ratio in points.values() for number in _finite(ratio)]
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
        axes.barh(i, middle - 1, left=1, color=OURS, linewidth=0)
        axes.plot([low, high], [i, i], color=INK, linewidth=1.2)
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
