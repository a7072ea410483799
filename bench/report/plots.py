"""Pictures of one run, as SVG files: one idea each, and none for suites that the run does not have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib

from bench.report import drawing
from bench.report.cells import by_clock, clocks, having, ratio
from bench.results.names import BARE, BOTH, DEVICE_TIME, FAST, STOCK, WALL
from bench.results.schema import Group, Ratio, Result

Picture = tuple[Path, str]

MIN_POINTS = 3  # of a line
# suite -> its name in the picture: what is done once, then what every step does
_AGAINST_STOCK = {
    "initialisation": "initialisation",
    "loading": "loading an adapter",
    "merge": "merge and unmerge",
    "step": "training step",
    "block": "one block, forward + backward",
    "generation": "generate(), adapter unmerged",
}


def draw(result: Result, folder: Path, stem: str) -> list[Picture]:
    """Writes ``folder/stem-….svg``; returns each file with a sentence that says what it shows."""
    result = result.with_both()
    with matplotlib.rc_context(drawing.SETTINGS):
        pictures = (
            _overhead(result, folder / f"{stem}-overhead-by-tokens.svg"),
            _against_stock(by_clock(result, WALL), folder / f"{stem}-against-stock.svg"),
        )
    return [picture for picture in pictures if picture is not None]


def families(groups: Iterable[Group]) -> list[dict[int, Group]]:
    """Groups that differ in the number of tokens alone, by ascending number."""
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


def _overhead(result: Result, path: Path) -> Picture | None:
    """Of the layer that was timed with the most numbers of tokens, the first if several."""
    timed = by_clock(result, DEVICE_TIME if DEVICE_TIME in clocks(result) else WALL)
    layers = having({BARE}, timed.select(suite="layer", **{"pass": BOTH}))
    family = max(families(layers), key=len, default={})
    points: dict[str, dict[int, Ratio]] = {}
    for tokens, group in family.items():
        for name in group.timings:
            percent = Ratio(*(100 * (number - 1) for number in group.ratio(name, BARE)))
            points.setdefault(name, {})[tokens] = percent
    series = {name: line for name, line in points.items() if len(line) > 1 and name != BARE}
    if len(family) < MIN_POINTS or not series:
        return None
    at = described({name: value for name, value in group.axes.items() if name != "tokens"})
    title = f"Time over the bare frozen layer, forward + backward\n{at}"
    figure, axes = drawing.blank(8.6, 3.6, title)
    drawing.lines(axes, series, " %")
    axes.set_xlabel("tokens in the batch (log)")
    axes.set_ylabel("% over the bare layer" + (" (log)" if axes.get_yscale() == "log" else ""))
    caption = f"What an adapter adds to the time of a frozen linear layer ({at}), by tokens in the batch"
    if ours := points.get(FAST):
        ends = " and ".join(f"{ours[tokens].median:.0f} % at {tokens}" for tokens in (min(ours), max(ours)))
        caption += f": {FAST} {ends} (bands: intervals of the median over the rounds)"
    return drawing.save(figure, path), caption + "."


def _against_stock(result: Result, path: Path) -> Picture | None:
    factors = {}
    for suite, what in _AGAINST_STOCK.items():
        for group in result.select(suite=suite):
            if (faster := ratio(group, STOCK, FAST)) is not None:
                factors[f"{what}\n{described(group.axes)}"] = faster
    if not factors:
        return None
    figure, axes = drawing.blank(7.2, 0.9 + 0.42 * len(factors), "Times faster than stock PEFT")
    drawing.bars(axes, factors)
    axes.set_xlabel("times faster (log; 1: as fast as stock PEFT)")
    caption = "What a user waits for, as times faster than stock PEFT (lines: intervals of the median)."
    return drawing.save(figure, path), caption
