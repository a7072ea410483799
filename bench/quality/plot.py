"""The picture of `bench.quality_report`: what every method learned against what it forgot."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state

from bench.quality.report import (
    FACTS,
    FULL,
    KNOWN,
    MICA,
    SAME_RANK,
    SAME_SIZE,
    spread,
    trained_methods,
    validation_loss,
)

INK = "#808080"  # as far from white as from black: the picture has no background of its own
# colour and marker: told apart without colour, too
MARKS = {
    MICA: ("#E69F00", "o"),
    SAME_RANK: ("#0072B2", "s"),
    SAME_SIZE: ("#56B4E9", "D"),
    FULL: ("#CC79A7", "^"),
}


def figure(result: dict, path: Path) -> None:
    """Write an SVG to ``path``. Large marks: the chosen learning rate, mean and range over the seeds. Small
    ones: the other rates that were tried."""
    with matplotlib.rc_context({"svg.hashsalt": "mica", "svg.fonttype": "none", "font.size": 10}):
        drawing = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = drawing.subplots()
        _draw(axes, result)
        drawing.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _draw(axes, result: dict) -> None:
    before = result["base"]
    for name in trained_methods(result):
        if name not in MARKS:  # stock MiCA lies on MiCA
            continue
        colour, marker = MARKS[name]
        learned = spread(result, name, FACTS, change=True)
        forgotten = spread(result, name, KNOWN, change=True)
        others = [
            run["evaluation"]
            for run in result["runs"]
            if run["method"] == name and math.isfinite(validation_loss(run))
        ]
        axes.scatter(
            [FACTS.of(before) - FACTS.of(e) for e in others],
            [KNOWN.of(e) - KNOWN.of(before) for e in others],
            s=14,
            color=colour,
            marker=marker,
            alpha=0.6,
            linewidths=0,
        )
        axes.errorbar(
            -learned.mean,
            forgotten.mean,
            xerr=[[learned.high - learned.mean], [learned.mean - learned.low]],
            yerr=[[forgotten.mean - forgotten.low], [forgotten.high - forgotten.mean]],
            color=colour,
            marker=marker,
            markersize=11,
            elinewidth=1.2,
            linestyle="none",
            label=name.removesuffix(", mica.fast"),
        )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("learned: fall of the loss on new facts, among their answers →", color=INK)
    axes.set_ylabel("forgotten: rise of the loss on known facts →", color=INK)
    axes.set_title(
        "Better: right and low. Small marks: other learning rates and single seeds",
        color=INK,
        loc="left",
        fontsize=11,
    )
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK)
