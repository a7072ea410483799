"""How cost grows: exponents of measured times, beside those of the floating-point operations.

A cost that is a power of one quantity, others fixed, is a straight line of that slope on logarithmic axes;
`fits` finds it by least squares. One point a value, the median over its rounds: a point's distance from the
line is mostly the machine's (caches, the vendor's choice of kernel) and common to its rounds, so that fitting
every round would feign precision.

What operations predict is fitted in the same way over the same values, because counts of operations are sums
of powers: those of a layer with its adapter grow with the rank, but hardly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log
from statistics import median
from typing import NamedTuple

from scipy.stats import linregress

from bench import kernel_cost
from bench.results import BACKWARD, BARE, BOTH, FORWARD, NO_GRADIENT, Group, Result

MIN_POINTS = 3  # two make a line without an error
TOTAL, EXTRA = "time", "extra time over the bare layer"
NOTE = (
    "The operations of an adapter are proportional to its rank. Of its traffic only the factors are: it reads"
    " its input and updates its output once, whatever the rank. Extra time that grows slower than the rank is"
    " spent on that."
)


class Fit(NamedTuple):
    """seconds ∝ value^slope. ``error``: the slope's standard error; ``predicted``: the operations' slope.

    ``axis``: "tokens", "rank", "width" (out = in) or "layers"; ``at``: the axes that are fixed, as text.
    """

    axis: str
    what: str
    at: str
    values: list[int]
    slope: float
    error: float
    predicted: float


class Family(NamedTuple):
    """Groups of one suite that differ in the value of one axis."""

    axis: str
    fixed: dict[str, str | int]
    groups: dict[int, Group]

    @property
    def at(self) -> str:
        """The fixed axes as text, without suite and pass."""
        shown = {name: value for name, value in self.fixed.items() if name not in ("suite", "pass")}
        words = [str(shown.pop("model"))] if "model" in shown else []
        if "out" in shown and "in" in shown:
            words.append(f"{shown.pop('out')} × {shown.pop('in')}")
        for name, value in shown.items():
            counted = name in ("tokens", "layers")
            words.append(
                f"{value} {name}" if counted else f"{name} {value}" if name != "dtype" else str(value)
            )
        return ", ".join(words)


def families(result: Result, axis: str, **chosen: str | int) -> list[Family]:
    """All families along ``axis`` of groups whose axes are ``chosen``, by ascending value."""
    found: dict[tuple, Family] = {}
    for group in result.select(**chosen):
        fixed = dict(group.axes)
        if axis == "width":
            value = fixed.pop("out", None)
            if fixed.pop("in", None) != value:
                continue
        else:
            value = fixed.pop(axis, None)
        if value is not None:
            family = found.setdefault(tuple(sorted(fixed.items())), Family(axis, fixed, {}))
            family.groups[int(value)] = group
    return [one._replace(groups=dict(sorted(one.groups.items()))) for one in found.values()]


def summed(result: Result) -> Result:
    """With the sums of forward and backward, if they are not there yet."""
    return result if any(result.select(**{"pass": BOTH})) else result.with_both()


def slope(values: list[float], costs: list[float]) -> tuple[float, float]:
    """d log cost ÷ d log value, and its standard error."""
    line = linregress([log(value) for value in values], [log(cost) for cost in costs])
    return float(line.slope), float(line.stderr)


def layer_flops(axes: dict[str, str | int], rival: str) -> float:
    """Operations of one layer's pass as `kernel_cost` counts them, rank not padded.

    All adapters have the same, in other launches; the bare layer has its GEMMs only.
    """
    shape = kernel_cost.Layer(*(int(axes[name]) for name in ("tokens", "out", "in", "rank")), target="")
    cost = kernel_cost.bare(shape) if rival == BARE else kernel_cost.stock(shape, kernel_cost.BF16)
    passes = {FORWARD: cost.forward, NO_GRADIENT: cost.forward, BACKWARD: cost.backward}
    passes[BOTH] = [*cost.forward, *cost.backward]
    return sum(kernel.flops for kernel in passes[str(axes["pass"])])


def _layer(group: Group, rival: str) -> float:
    return layer_flops(group.axes, rival)


def _blocks(group: Group, rival: str) -> float:
    return float(group.axes["layers"])  # equal blocks; embedding and head are not counted


def _factorisation(group: Group, rival: str) -> float:
    return float(group.axes["out"]) ** 3  # Gram matrix, factorisations and SVD alike, of n × n


# (axis, suite, operations of a group's rival)
_SOURCES: list[tuple[str, str, Callable[[Group, str], float]]] = [
    ("tokens", "layer", _layer),
    ("width", "layer", _layer),
    ("rank", "layer", _layer),
    ("layers", "layers", _blocks),
    ("width", "subspace", _factorisation),
]


def extra(group: Group, rival: str) -> float:
    """Seconds over the bare one, the median over the rounds."""
    pairs = zip(group.rivals[rival].seconds, group.rivals[BARE].seconds, strict=True)
    return median(a - b for a, b in pairs)


def _fit(family: Family, rival: str, kind: str, operations: Callable[[Group, str], float]) -> Fit | None:
    points = {}
    for value, group in family.groups.items():
        if rival not in group.rivals or (kind == EXTRA and BARE not in group.rivals):
            continue
        seconds, counted = group.rivals[rival].median, operations(group, rival)
        if kind == EXTRA:
            seconds = extra(group, rival)
            # A block's own operations are not counted: those of its adapters are in the same proportion
            counted -= operations(group, BARE) if operations is _layer else 0.0
        if seconds > 0:
            points[value] = seconds, counted
    if len(points) < MIN_POINTS:
        return None
    values, (seconds, counted) = list(points), zip(*points.values(), strict=True)
    suite, part = family.fixed["suite"], family.fixed.get("pass")
    what = ", ".join(filter(None, [suite, part, rival])) + (f": {EXTRA}" if kind == EXTRA else "")
    return Fit(family.axis, what, family.at, values, *slope(values, seconds), slope(values, counted)[0])


def fits(result: Result) -> list[Fit]:
    """Every rival's total and extra time along every axis that has enough values; passes apart and summed."""
    return list(_fits(summed(result)))


def _fits(result: Result) -> Iterator[Fit]:
    for axis, suite, operations in _SOURCES:
        for family in families(result, axis, suite=suite):
            for rival in dict.fromkeys(name for group in family.groups.values() for name in group.rivals):
                for kind in (TOTAL, EXTRA) if rival != BARE else (TOTAL,):
                    if fit := _fit(family, rival, kind, operations):
                        yield fit


def table(fits: list[Fit]) -> str:
    """As Markdown; "" without fits."""
    if not fits:
        return ""
    lines = ["| grows with | what | at | from | to | points | exponent ± s.e. | of the operations |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for axis, what, at, values, measured, error, predicted in fits:
        cells = [axis, what, at, *map(str, (values[0], values[-1], len(values)))]
        lines.append("| " + " | ".join([*cells, f"{measured:.2f} ± {error:.2f}", f"{predicted:.2f}"]) + " |")
    if any(fit.axis == "rank" and fit.what.endswith(EXTRA) for fit in fits):
        lines += ["", NOTE]
    return "\n".join(lines) + "\n"
