"""Pictures of what was learned: by what was forgotten, and where updates lie."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.report.plots import INK, OURS, PEFT, SETTINGS, plain

OTHER, VIOLET = "#008F6B", "#A66BBE"


def energy(profiles: dict[str, list[float]], path: Path) -> None:
    """``profiles``: title -> energy along each tenth of the singular directions, largest first, over that
    along as many random ones. Writes the picture."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.add_subplot(title="Where updates lie, by the singular values of the weight")
        for (name, values), colour in zip(profiles.items(), (VIOLET, PEFT, OTHER), strict=True):
            axes.plot(range(1, len(values) + 1), values, "-", marker="o", color=colour, label=name)
        axes.axhline(1, color=INK, linewidth=1)
        axes.set(yscale="log", xlabel="tenth of the left singular vectors: 1 the largest, 10 the smallest")
        axes.set_ylabel("energy, random directions: 1 (log)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plain(axes.xaxis, [*range(1, 11)])
        plain(axes.yaxis)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, metadata={"Software": None})


def trade_off(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """``curves``: method -> (forgotten in nats, new facts right in %). Writes the picture."""
    hues = {"MiCA": OURS, "LoRA": PEFT, "frozen": OTHER, "full": VIOLET}
    marks, seen = "osD^v", Counter()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        axes = figure.add_subplot(title="New facts learned, by what was forgotten for them")
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
