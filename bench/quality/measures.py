"""What a run's evaluation says, over the seeds, and when two methods differ; no torch."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, median
from typing import NamedTuple

from bench.quality.schedule import chosen_rate


class Measure(NamedTuple):
    """Part of an evaluation. ``title``: its column; ``digits``: decimals that are printed."""

    title: str
    of: Callable[[dict], float]
    digits: int = 3


FACTS = Measure("new facts, loss among answers", lambda e: e["facts, held_out, among answers"])
PICKED = Measure("new facts, right %", lambda e: 100 * e["facts, held_out, picked"], 1)
ANSWER = Measure("new facts, loss of the answer", lambda e: e["facts, held_out"])
PROSE = Measure("new prose, loss", lambda e: e["prose, held_out"])
REFERENCE = Measure("Python reference, loss", lambda e: e["reference"])
KNOWN = Measure("known facts, loss", lambda e: e["known facts"])
KNOWN_RECALLED = Measure("known facts, recalled %", lambda e: 100 * e["known facts, recalled"], 1)
LEARNED, FORGOTTEN = (FACTS, PICKED, ANSWER, PROSE), (REFERENCE, KNOWN, KNOWN_RECALLED)


class Spread(NamedTuple):
    """Mean and range over the seeds, and their number."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(mean(values), min(values), max(values), len(values))

    def text(self, digits: int = 3) -> str:
        middle, low, high = (f"{round(value, digits) + 0.0:.{digits}f}" for value in self[:3])  # no -0.0
        return middle if low == high else f"{middle} ({low} to {high})"


def chosen_runs(result: dict, method: str) -> list[dict]:
    """The runs that count, one per seed; those that diverged at the chosen rate are reported separately."""
    rate = chosen_rate(result, method)
    return [
        run
        for run in result["runs"]
        if (run["method"], run["rate"]) == (method, rate) and run["evaluation"] is not None
    ]


def trained_methods(result: dict) -> list[str]:
    """Those with a learning rate that converged."""
    return [name for name in result["methods"] if chosen_runs(result, name)]


def after(result: dict, method: str, measure: Measure) -> Spread:
    return Spread.of([measure.of(run["evaluation"]) for run in chosen_runs(result, method)])


def change(result: dict, method: str, measure: Measure, sign: int = 1) -> Spread | None:
    """Change of ``measure`` over the base model, times ``sign``; None where no learning rate converged."""
    before, runs = measure.of(result["base"]), chosen_runs(result, method)
    return Spread.of([sign * (measure.of(run["evaluation"]) - before) for run in runs]) if runs else None


def mica_of(result: dict, recipe: str) -> str | None:
    """The name of the recipe's MiCA, to which its other methods are compared."""
    kinds = {(facts["kind"], facts["recipe"]): name for name, facts in result["methods"].items()}
    return kinds.get(("mica", recipe))


def compared(ours: Spread | None, other: Spread | None) -> str:
    """MiCA's value against a baseline's, as far as the ranges over the seeds allow; "" for one seed."""
    if ours is None or other is None or min(ours.count, other.count) < 2:
        return ""
    if ours.low > other.high:
        return "MiCA: more"
    return "MiCA: less" if ours.high < other.low else "no clear difference"


def step_seconds(result: dict, method: str) -> float | None:
    """Median over all steps of all runs of the method: its speed does not depend on the learning rate."""
    seconds = [s for run in result["runs"] if run["method"] == method for s in run["seconds"]]
    return median(seconds) if seconds else None
