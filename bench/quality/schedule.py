"""Points of learning and forgetting, and which run comes next: both follow from a result, so a run goes on.

A point is a model at one stop of one training. *Forgotten* is the mean rise of the losses on text that the
model knew (`KNOWN`), in nats. For each limit of forgetting a method has the point that has learned most by
the validation questions, which are neither trained on nor reported; the other seeds run at those rates.
"""

from __future__ import annotations

import math
from statistics import mean
from typing import NamedTuple

KNOWN = ("reference", "code", "known facts")
LIMITS = (0.1, 0.25, 0.5, 1.0, math.inf)  # nats
VALIDATION = "facts, validation, among answers"
TEST = "facts, held_out"
FIRST = (1, 2, 0, 3)  # of a method's rates the middle ones: a result that ends early has one of each method


class Planned(NamedTuple):
    """One training run to do."""

    method: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}, rate {self.rate:g}, seed {self.seed}"


class Point(NamedTuple):
    """``right``: the answers to the test's questions, "1" or "0" each; "" in results that lack them."""

    rate: float
    step: int
    seed: int
    forgotten: float
    evaluation: dict[str, float]
    right: str = ""


def points(result: dict, method: str) -> list[Point]:
    found = []
    for run in result["runs"]:
        if run["method"] != method:
            continue
        for one in run["points"]:
            losses = one["evaluation"]
            forgotten = _forgotten(losses, result["base"])
            right = one.get("right", {}).get(TEST, "")
            found.append(Point(run["rate"], one["step"], run["seed"], forgotten, losses, right))
    return found


def _forgotten(evaluation: dict, base: dict) -> float:
    return mean(evaluation[name] - base[name] for name in KNOWN)


def chosen(result: dict, method: str, limit: float) -> list[Point]:
    """The same point of every seed, first the one that chose; none if it would have learned nothing."""
    found = points(result, method)
    within = [one for one in found if one.seed == 0 and one.forgotten <= limit]
    best = min(within, key=lambda one: one.evaluation[VALIDATION], default=None)
    if best is None or best.evaluation[VALIDATION] >= result["base"][VALIDATION]:
        return []
    return [one for one in found if (one.rate, one.step) == (best.rate, best.step)]


def rates_that_count(result: dict, method: str) -> list[float]:
    picked = [chosen(result, method, limit) for limit in LIMITS]
    return list(dict.fromkeys(found[0].rate for found in picked if found))


def planned(result: dict) -> list[Planned]:
    """All that is left to do, in order: the first seed of all rates, methods in turns, then other seeds.

    Seeds follow from what was measured: they are known only when all rates have run.
    """
    settings, done = result["settings"], {(run["method"], run["rate"], run["seed"]) for run in result["runs"]}
    first, more = [], []
    for number in FIRST[: settings["rates"]]:
        for name, method in result["plan"].items():
            if number < len(method["rates"]):
                first.append(Planned(name, method["rates"][number], 0))
    for seed in range(1, settings["seeds"]):
        for name in result["plan"] if "base" in result else ():
            more += [Planned(name, rate, seed) for rate in rates_that_count(result, name)]
    left = [one for one in first if one not in done]
    return left or [one for one in more if one not in done]


def missing(result: dict) -> list[str]:
    """One sentence a method."""
    lines = []
    for name in result["plan"]:
        runs = [f"{one.rate:g} (seed {one.seed})" for one in planned(result) if one.method == name]
        if runs:
            lines.append(f"{name}: learning rate {', '.join(runs)}")
    if lines and all("(seed 0)" in line for line in lines):
        lines.append("the further seeds at the rates that these show to count")
    return lines
