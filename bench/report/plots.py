"""The picture of one run, by seaborn: none for suites that the run does not have.

PNG with a transparent background and grey text, which reads on light and dark pages; reproducible.
"""

from __future__ import annotations

from math import inf
from pathlib import Path

import matplotlib
import seaborn
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display and no global state
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bench.report.words import in_words, inverse, shows_no_difference
from bench.results.cell import Group, Ratio
from bench.results.names import FAST, STOCK, WALL
from bench.results.schema import Result

INK = "#7a7a7a"  # as far from GitHub's light page as from its dark one
# Okabe and Ito's hues, as dark as both pages allow
OURS = "#D55E00"
FILLED = {"facecolor": OURS, "edgecolor": OURS, "linewidth": 1}
HOLLOW = {"facecolor": "none", "edgecolor": INK, "linewidth": 1}
COLUMN = 1.1  # where factors end, in widths of the axes
SETTINGS = {  # override the user's matplotlibrc
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.5,
    "text.color": INK,
    "savefig.dpi": 144,
    "savefig.facecolor": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
ONCE = "paid once"
EACH_STEP = "paid at each step"
# panel -> suite -> its name there
PANELS = {
    ONCE: {
        "initialisation": "initialisation",
        "loading": "loading an adapter",
        "merge": "merging",
    },
    EACH_STEP: {
        "step": "training step",
        "block": "one block, forward + backward",
    },
}


def draw(result: Result, folder: Path, stem: str) -> list[tuple[Path, str]]:
    """Writes ``folder/stem-against-stock.png``; returns that file with a sentence that says what it shows."""
    groups = [group for group in result.groups if group.axes.get("clock", WALL) == WALL]
    panels = {panel: cells for panel, suites in PANELS.items() if (cells := _cells(groups, suites))}
    if not panels:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-against-stock.png"
    with matplotlib.rc_context(SETTINGS):
        against_stock(panels).savefig(path, metadata={"Software": None})
    what = " and what is ".join(panels)
    caption = (
        f"Speed relative to stock PEFT of what is {what} (lines: 95 % intervals of the median; hollow bars:"
        " the interval contains 1, so neither is shown to be faster)."
    )
    return [(path, caption)]


def against_stock(panels: dict[str, list[tuple[str, Group]]]) -> Figure:
    """A row of bars for each panel, with a bar for each of its cells."""
    counts = [len(cells) for cells in panels.values()]
    figure = Figure(figsize=(7.2, 0.7 + 0.65 * len(panels) + 0.36 * sum(counts)), layout="constrained")
    figure.suptitle("Speed relative to stock PEFT (right is faster)", x=0.01, ha="left", fontsize=10.5)
    rows = figure.subplots(len(panels), 1, height_ratios=counts, squeeze=False)[:, 0]
    all_factors = []
    for axes, (panel, cells) in zip(rows, panels.items(), strict=True):
        common = _common(cells)
        factors = _factors(cells, common)
        all_factors += factors.values()
        bars(axes, factors, is_log=panel == ONCE)
        title = panel.capitalize()
        if common:
            title += f": {in_words(common)}"
        axes.set_title(title)
    figure.legend(handles=_legend(all_factors), loc="outside lower left", ncols=3)
    return figure


def _cells(groups: list[Group], suites: dict[str, str]) -> list[tuple[str, Group]]:
    """Those of a panel that have both implementations, each with the name of its suite there."""
    cells = []
    for suite, what in suites.items():
        for group in groups:
            if group.axes.get("suite") == suite and {STOCK, FAST} <= group.timings.keys():
                cells.append((what, group))
    return cells


def _common(cells: list[tuple[str, Group]]) -> dict[str, str | int]:
    """The axes in which all cells of a panel agree: its title has them, instead of every label."""
    _, first = cells[0]
    if len(cells) == 1:
        return {}
    common = {}
    for axis, value in first.axes.items():
        if axis != "suite" and all(group.axes.get(axis) == value for _, group in cells):
            common[axis] = value
    return common


def _factors(cells: list[tuple[str, Group]], common: dict[str, str | int]) -> dict[str, Ratio]:
    """Label -> how many times as fast as stock PEFT mica.fast is."""
    factors = {}
    for what, group in cells:
        own = {axis: value for axis, value in group.axes.items() if axis not in common}
        factors[f"{what}\n{in_words(own)}".rstrip()] = inverse(group.ratio(FAST, STOCK))
    return factors


def bars(axes: Axes, factors: dict[str, Ratio], is_log: bool) -> None:
    """They start at 1, to the left where below it, the first on top; factors stand in a column on the right.

    A bar is hollow, and its factor grey, where the interval contains 1.
    """
    drawn = {name: _finite(ratio) for name, ratio in factors.items()}
    for i, (name, ratio) in enumerate(factors.items()):
        middle, low, high = drawn[name]
        colour = INK if shows_no_difference(ratio) else OURS
        look = HOLLOW if shows_no_difference(ratio) else FILLED
        axes.barh(i, middle - 1, left=1, height=0.6, **look)
        axes.plot([low, high], [i, i], color=INK, linewidth=1.2)
        text = f"{middle:.2f}×" if middle < 10 else f"{middle:.0f}×"
        at_the_right = {"xycoords": axes.get_yaxis_transform(), "va": "center", "ha": "right"}
        axes.annotate(text, (COLUMN, i), color=colour, **at_the_right)
    axes.set_yticks(range(len(factors)), factors)
    axes.set_ylim(len(factors) - 0.5, -0.5)
    lowest = min(1.0, *(ratio.low for ratio in drawn.values()))
    highest = max(1.0, *(ratio.high for ratio in drawn.values()))
    if is_log:
        axes.set(xscale="log", xlim=(0.85 * lowest, 1.15 * highest), xlabel="speed (log)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:  # at least a quarter to both sides: a factor of 1.02 is to look like one
        axes.set(xlim=(min(0.75, lowest - 0.05), max(1.25, highest + 0.05)), xlabel="speed")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=INK, linewidth=1, zorder=0)
    axes.grid(visible=False, axis="y")
    seaborn.despine(ax=axes, left=True, bottom=True)


def _legend(factors: list[Ratio]) -> list[Artist]:
    why_hollow = "it contains 1"
    if any(ratio.high == inf for ratio in factors):
        why_hollow = "it contains 1, or one round only"
    return [
        Patch(**FILLED, label="mica.fast"),
        Line2D([], [], color=INK, linewidth=1.2, label="95 % interval of the median"),
        Patch(**HOLLOW, label=f"{why_hollow}: no difference shown"),
    ]


def _finite(ratio: Ratio) -> Ratio:
    """One round has no interval: none is drawn."""
    return ratio if ratio.high < inf else Ratio(ratio.median, ratio.median, ratio.median)
