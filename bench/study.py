"""What a study of model quality found: the table and the picture of bench/README.md, from its raw results.

It adapted SmolLM2-135M to facts that it cannot have known, by several methods, at several learning rates,
each measured at three stops (by the package ``bench.quality`` of commit 4265cbb). A point is a model at one
stop of one training. *Forgotten* is the mean rise of the losses on text that the model knew, in nats a token.
For each limit of forgetting a method has the point that has learned most by the validation questions, which
are neither trained on nor reported.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, variance
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: Agg, whatever the display, and no global state

from bench.report.words import Row, markdown
from mica.cli.plot import STYLE

KNOWN = ("reference", "code", "known facts")
VALIDATION = "facts, validation, among answers"
TEST = "facts, held_out"
LIMITS = (0.1, 0.25, 0.5, 1.0, math.inf)  # nats
COLUMNS = [f"at most {limit:g} nats" if limit < math.inf else "any number" for limit in LIMITS]
COMPARED = (  # equal numbers of trained parameters; whether minor directions matter
    ("MiCA, r = 64", "LoRA, r = 32"),
    ("MiCA, r = 16", "frozen random B, r = 16"),
)
COLOURS = {"MiCA, r = 64": "#D55E00", "LoRA, r = 32": "#0072B2", "full fine-tuning": "#009E73"}
GREY = "#9a9a9a"


class Point(NamedTuple):
    """``right``: the answers to the test's questions, "1" or "0" each; "" where they were not kept."""

    rate: float
    step: int
    seed: int
    forgotten: float
    evaluation: dict[str, float]
    right: str = ""

    @property
    def percent(self) -> float:
        """Of the test's questions that are answered rightly."""
        return percent(self.evaluation)


def percent(evaluation: dict[str, float]) -> float:
    return 100 * evaluation[f"{TEST}, picked"]


def points(study: dict, method: str) -> list[Point]:
    found = []
    for run in study["runs"]:
        if run["method"] != method:
            continue
        for one in run["points"]:
            losses = one["evaluation"]
            forgotten = mean(losses[name] - study["base"][name] for name in KNOWN)
            right = one.get("right", {}).get(TEST, "")
            found.append(Point(run["rate"], one["step"], run["seed"], forgotten, losses, right))
    return found


def chosen(study: dict, method: str, limit: float) -> list[Point]:
    """The same point of every seed, first the one that chose; none if it would have learned nothing."""
    found = points(study, method)
    within = [one for one in found if one.seed == 0 and one.forgotten <= limit]
    best = min(within, key=lambda one: one.evaluation[VALIDATION], default=None)
    if best is None or best.evaluation[VALIDATION] >= study["base"][VALIDATION]:
        return []
    return [one for one in found if (one.rate, one.step) == (best.rate, best.step)]


def rates_that_count(study: dict, method: str) -> list[float]:
    """Those of the chosen points: the ones that other seeds ran at."""
    picked = [chosen(study, method, limit) for limit in LIMITS]
    return list(dict.fromkeys(found[0].rate for found in picked if found))


def values(study: dict, method: str) -> list[list[float]]:
    """For each limit the percentage of each seed; none where the method has learned nothing."""
    return [[one.percent for one in chosen(study, method, limit)] for limit in LIMITS]


def table(study: dict) -> str:
    """A row a method, a column a limit of forgetting: the mean and the range of the seeds."""
    rows = [["before training", f"{percent(study['base']):.0f}", *[""] * (len(LIMITS) - 1)]]
    for name in study["plan"]:
        rows.append([name, *map(_spread, values(study, name))])
    return markdown(["forgotten", *COLUMNS], rows)


def _spread(seeds: list[float]) -> str:
    if not seeds:
        return ""
    return f"{mean(seeds):.0f} ({min(seeds):.0f} to {max(seeds):.0f})"


def difference(study: dict, ours: list[Point], theirs: list[Point]) -> tuple[float, float]:
    """(points, half the 95 % interval) between two methods' percentages, over seeds and questions (normal).

    ``ours``, ``theirs``: one point a seed. The questions are the same for all seeds, so more seeds do not
    make the part that is due to the choice of questions smaller.
    """
    questions = study["texts"][TEST]["tokens"]  # an answer is a token
    shares = [[one.percent for one in points] for points in (ours, theirs)]
    of_seeds = sum(variance(one) / len(one) for one in shares if len(one) > 1)
    other = {one.seed: one for one in theirs}
    of_questions = mean(_over_questions(one, other.get(one.seed, theirs[0]), questions) for one in ours)
    return mean(shares[0]) - mean(shares[1]), 1.96 * math.sqrt(of_seeds + of_questions)


def _over_questions(ours: Point, theirs: Point, questions: int) -> float:
    """The variance of the difference of two models' percentages over questions like these, squared points.

    Question by question where single answers are known; else as if each model had answered questions of its
    own, which is too much rather than too little.
    """
    if not (ours.right and theirs.right):
        return sum(one.percent * (100 - one.percent) for one in (ours, theirs)) / questions
    apart = [100 * (int(a) - int(b)) for a, b in zip(ours.right, theirs.right, strict=True)]
    return variance(apart) / questions


def differences(study: dict) -> dict[str, Row]:
    """Two methods -> for each limit of forgetting their difference."""
    rows = {}
    for ours, theirs in COMPARED:
        cells = []
        for limit in LIMITS:
            both = [chosen(study, name, limit) for name in (ours, theirs)]
            cells.append("{:+.0f} ± {:.0f}".format(*difference(study, *both)) if all(both) else "")
        rows[f"{ours} less {theirs}"] = cells
    return rows


def curve(study: dict, method: str) -> list[tuple[float, float]]:
    """(forgotten, percent) of what the table shows, means over the seeds."""
    picked = [seeds for limit in LIMITS if (seeds := chosen(study, method, limit))]
    return sorted({(mean(one.forgotten for one in s), mean(one.percent for one in s)) for s in picked})


def picture(study: dict, path: Path) -> None:
    """Write a PNG: the methods that one chooses between in colour, all others in grey."""
    with rc_context({**STYLE, "lines.markersize": 3}):
        figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot(
            title="New facts learned, by what was forgotten for them",
            xlabel="forgotten, nats per token",
            ylabel="new facts right, %",
        )
        others = [name for name in study["plan"] if name not in COLOURS]
        for name in others:
            label = "the other methods" if name == others[0] else None
            x, y = zip(*curve(study, name), strict=True)
            axes.plot(x, y, color=GREY, linewidth=0.8, alpha=0.6, label=label)
        for name, colour in COLOURS.items():
            x, y = zip(*curve(study, name), strict=True)
            axes.plot(x, y, marker="o", color=colour, linewidth=2, label=name)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend([*handles[1:], handles[0]], [*labels[1:], labels[0]], loc="lower right")
        figure.savefig(path, format="png", metadata={"Software": None})
