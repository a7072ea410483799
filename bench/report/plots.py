"""Pictures of one run, as SVG files: one idea each, and none of a suite that the run does not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench.scaling import MIN_POINTS, Family, families, summed

from bench import drawing
from bench.report.compare import is_ours
from bench.report.drawing import INK, Bar, Line
from bench.results.names import BACKWARD, BARE, BOTH, FAST, FORWARD, STOCK, SVD, UNGROUPED
from bench.results.schema import Group, Ratio, Result

Roofline = Callable[[dict[str, str | int], str], float | None]
Picture = tuple[Path, str]

# What is done once, then what every step does; and how a reader calls it.
_AGAINST_STOCK = {
    "initialisation": "initialisation",
    "loading": "loading an adapter",
    "merge": "merge and unmerge",
    "step": "training step",
    "block": "one block, forward + backward",
    "generation": "generate(), adapter unmerged",
}
_MOST_BARS = 45


@drawing.settled
def draw(result: Result, folder: Path, stem: str, roofline: Roofline | None = None) -> list[Picture]:
    """Writes ``folder/stem-….svg``; each file with a sentence that says what it shows.

    ``roofline``: seconds that a layer's cell would take at the machine's rates, by its axes and its rival;
    None where that is not modelled.
    """
    result = summed(result)
    pictures = [
        _overhead(result, "tokens", "tokens in the batch", folder / f"{stem}-overhead-by-tokens.svg"),
        _overhead(result, "rank", "rank of the adapter", folder / f"{stem}-overhead-by-rank.svg"),
        _subspace(result, folder / f"{stem}-subspace.svg"),
        _saved(result, "step", folder / f"{stem}-saved-step.svg"),
        _saved(result, "layer", folder / f"{stem}-saved-layer.svg"),
        _against_stock(result, folder / f"{stem}-against-stock.svg"),
    ]
    if roofline is not None:
        pictures.append(_roofline(result, roofline, folder / f"{stem}-roofline.svg"))
    return [picture for picture in pictures if picture is not None]


def _percent(group: Group, rival: str) -> Ratio:
    """Over the bare layer."""
    return Ratio(*(100 * (number - 1) for number in group.ratio(rival, BARE)))


def _longest(result: Result, axis: str, **chosen: str | int) -> Family | None:
    """The family with most values, the first of equals."""
    found = families(result, axis, **chosen)
    longest = max(found, key=lambda family: len(family.groups), default=None)
    return longest if longest and len(longest.groups) >= MIN_POINTS else None


def _overhead(result: Result, axis: str, label: str, path: Path) -> Picture | None:
    family = _longest(result, axis, suite="layer", **{"pass": BOTH})
    if family is None:
        return None
    points: dict[str, dict[int, Ratio]] = {}
    for value, group in family.groups.items():
        for rival in group.rivals:
            if rival != BARE and BARE in group.rivals:
                points.setdefault(rival, {})[value] = _percent(group, rival)
    series = [Line(name, found) for name, found in points.items() if len(found) > 1]
    if not series:
        return None
    figure, axes = drawing.blank(7.6, 3.6, "Time over the bare frozen layer, forward + backward", family.at)
    drawing.lines(axes, series, " %")
    axes.set_xlabel(f"{label} (log)")
    axes.set_ylabel("% over the bare layer" + (" (log)" if axes.get_yscale() == "log" else ""))
    ours = points.get(FAST)
    caption = f"What an adapter adds to the time of a frozen linear layer ({family.at}), by {label}"
    if ours:
        first, last = min(ours), max(ours)
        caption += (
            f": {FAST} {ours[first].median:.0f} % at {first} and {ours[last].median:.0f} % at {last}"
            " (bands: intervals of the median over the rounds)"
        )
    return drawing.save(figure, path), caption + "."


def _subspace(result: Result, path: Path) -> Picture | None:
    clusters: dict[str, list[Bar]] = {}
    for group in sorted(result.select(suite="subspace"), key=lambda one: -one.axes["out"] * one.axes["in"]):
        for rival in group.rivals if SVD in group.rivals else ():
            if rival != SVD:
                faster = group.ratio(SVD, rival)
                short = rival.removeprefix("minor_subspace, ").removeprefix("torch.linalg.")
                bar = Bar(rival, faster, f"{faster.median:.1f}×  {short}")
                clusters.setdefault(f"{group.axes['out']} × {group.axes['in']}", []).append(bar)
    if not clusters:
        return None
    if sum(map(len, clusters.values())) > _MOST_BARS:  # what a user gets without asking
        for shape, cluster in clusters.items():
            clusters[shape] = [bar for bar in cluster if not is_ours(bar.name) or "auto" in bar.name]
    count = sum(map(len, clusters.values())) + 0.6 * len(clusters)
    figure, axes = drawing.blank(
        7.2, 1.1 + 0.17 * count, f"Minor subspace of a weight: times faster than {SVD}"
    )
    drawing.bars(axes, clusters)
    axes.axvline(1, color=INK, linewidth=1, zorder=0)
    axes.set_xlabel(f"times faster than {SVD}")
    axes.set_ylabel("out × in features")
    best = [bar.value.median for cluster in clusters.values() for bar in cluster if is_ours(bar.name)]
    caption = f"The solver against a full {SVD}, by shape, method and rank"
    span = f": {min(best):.1f} to {max(best):.1f} times faster" if best else ""
    return drawing.save(figure, path), f"{caption}{span}."


def _usual(groups: list[Group]) -> Group | None:
    """The cell whose axes have the values that most cells have."""
    counts = Counter(item for group in groups for item in group.axes.items())
    return max(groups, key=lambda group: sum(counts[item] for item in group.axes.items()), default=None)


def _saved(result: Result, suite: str, path: Path) -> Picture | None:
    groups = [
        group
        for group in result.select(suite=suite)
        if any("saved_mb" in rival.facts for rival in group.rivals.values())
    ]
    group = _usual(groups)
    if group is None:
        return None
    saved = {name: one.facts["saved_mb"] for name, one in group.rivals.items() if "saved_mb" in one.facts}
    clusters = {name: [Bar(name, Ratio(mb, mb, mb), f"{mb:.4g} MB")] for name, mb in saved.items()}
    what = "a training step" if suite == "step" else "a linear layer"
    at = Family("", group.axes, {}).at
    figure, axes = drawing.blank(
        6.4, 1.0 + 0.34 * len(clusters), f"Activations that {what} keeps for its backward", at
    )
    drawing.bars(axes, clusters, thick=1.1)
    axes.set_xlabel("MB")
    caption = f"Megabytes that the forward of {what} ({at}) keeps for its backward, by rival"
    if saved.get(STOCK) and saved.get(FAST):
        caption += f": {FAST} keeps {100 * saved[FAST] / saved[STOCK]:.0f} % of what {STOCK} does"
    return drawing.save(figure, path), caption + "."


def _against_stock(result: Result, path: Path) -> Picture | None:
    clusters: dict[str, list[Bar]] = {}
    for suite, what in _AGAINST_STOCK.items():
        for group in result.select(suite=suite):
            ours = next((name for name in (FAST, UNGROUPED) if name in group.rivals), None)
            if ours is None or STOCK not in group.rivals:
                continue
            faster = group.ratio(STOCK, ours)
            at = Family("", group.axes, {}).at
            text = f"{faster.median:.2f}×" if faster.median < 10 else f"{faster.median:.0f}×"
            clusters[f"{what}\n{at}"] = [Bar(ours, faster, text)]
    if not clusters:
        return None
    figure, axes = drawing.blank(7.2, 0.9 + 0.42 * len(clusters), "Times faster than stock PEFT")
    drawing.bars(axes, clusters, thick=1.0, from_one=True)
    axes.axvline(1, color=INK, linewidth=1, zorder=0)
    axes.tick_params(axis="y", labelsize=8.5)
    axes.set_xlabel("times faster (log; 1: as fast as stock PEFT)")
    caption = "What a user waits for, as times faster than stock PEFT (lines: intervals of the median)."
    return drawing.save(figure, path), caption


def _roofline(result: Result, roofline: Roofline, path: Path) -> Picture | None:
    points: dict[str, list[tuple[float, float]]] = {}
    for part in (FORWARD, BACKWARD):
        for group in result.select(suite="layer", **{"pass": part}):
            for rival, measured in group.rivals.items():
                if seconds := roofline(group.axes, rival):
                    points.setdefault(rival, []).append((1e3 * seconds, 1e3 * measured.median))
    if not points:
        return None
    figure, axes = drawing.blank(6.4, 6.0, "Measured time of a layer's pass against its roofline")
    for i, (rival, pairs) in enumerate(points.items()):
        look, (modelled, measured) = drawing.style(rival), zip(*pairs, strict=True)
        label = f"{rival} ({median(b / a for a, b in pairs):.2f}×)"
        axes.plot(
            modelled,
            measured,
            look.marker,
            color=look.colour,
            markersize=4,
            alpha=0.8,
            linewidth=0,
            label=label,
            gid=f"series-{i}",
        )
    numbers = [number for pairs in points.values() for pair in pairs for number in pair]
    ends = 0.6 * min(numbers), 1.6 * max(numbers)
    axes.plot(ends, ends, color=INK, linewidth=1, gid="roofline")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        drawing.plain_ticks(axis)
    axes.set_xlabel("roofline, ms (log)")
    axes.set_ylabel("measured, ms (log)")
    axes.legend(
        loc="lower right", title="median of measured ÷ roofline", frameon=False, labelcolor="linecolor"
    )
    caption = (
        "Every pass of a layer, measured against the time that the machine's measured rates allow"
        " (the diagonal); in brackets the median of measured over allowed."
    )
    return drawing.save(figure, path), caption
