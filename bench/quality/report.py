"""Tables and the picture of a result of `bench.quality`: ``python -m bench.quality.report FILE.json`` writes
them beside it. All that is printed follows from the file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, variance
from typing import NamedTuple

from bench.quality.picture import trade_off
from bench.quality.recipes import STOPS
from bench.quality.schedule import LIMITS, TEST, Point, chosen, missing, points
from bench.report.words import markdown


class Measure(NamedTuple):
    """Part of an evaluation. ``title``: of its table; ``digits``: decimals that are printed."""

    title: str
    of: Callable[[dict], float]
    digits: int = 2


RIGHT = Measure("New facts, right %", lambda e: 100 * e[f"{TEST}, picked"], 0)
AMONG = Measure("New facts, loss among answers", lambda e: e[f"{TEST}, among answers"])
PROSE = Measure("New prose, loss", lambda e: e["prose, held_out"])
LEARNED = (RIGHT, AMONG, PROSE)
COLUMNS = [f"at most {limit:g} nats" if limit < math.inf else "any number" for limit in LIMITS]
COMPARED = (  # equal numbers of trained parameters; whether minor directions matter; what freezing costs
    ("MiCA, r = 64", "LoRA, r = 32"),
    *((f"MiCA, r = {rank}", f"frozen random B, r = {rank}") for rank in (16, 64)),
    ("MiCA, r = 16", "frozen B of the largest, r = 16"),
    ("MiCA, r = 64", "full fine-tuning"),
)


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several seeds, the range."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def values(result: dict, method: str, measure: Measure) -> list[list[float]]:
    """For each limit of forgetting one value a seed; none where the method has learned nothing."""
    return [[measure.of(one.evaluation) for one in chosen(result, method, limit)] for limit in LIMITS]


def difference(result: dict, ours: list[Point], theirs: list[Point]) -> tuple[float, float]:
    """(points, half the 95 % interval) between two methods' `RIGHT`, over seeds and questions (normal).

    ``ours``, ``theirs``: one point a seed. The questions are the same for all seeds, so more seeds do not
    make the part that is due to the choice of questions smaller.
    """
    questions = result["texts"][TEST]["tokens"]  # an answer is a token
    shares = [[RIGHT.of(one.evaluation) for one in points] for points in (ours, theirs)]
    of_seeds = sum(variance(one) / len(one) for one in shares if len(one) > 1)
    other = {one.seed: one for one in theirs}
    of_questions = mean(_over_questions(one, other.get(one.seed, theirs[0]), questions) for one in ours)
    return mean(shares[0]) - mean(shares[1]), 1.96 * math.sqrt(of_seeds + of_questions)


def _over_questions(ours: Point, theirs: Point, questions: int) -> float:
    """The variance of the difference of two models' `RIGHT` over questions like these, squared points.

    Question by question where single answers are known; else as if each model had answered questions of its
    own, which is too much rather than too little.
    """
    if ours.right and theirs.right:
        apart = [100 * (int(a) - int(b)) for a, b in zip(ours.right, theirs.right, strict=True)]
        return variance(apart) / questions
    shares = (RIGHT.of(one.evaluation) for one in (ours, theirs))
    return sum(share * (100 - share) for share in shares) / questions


def differences(result: dict) -> str:
    """A row for two methods, a column a limit of forgetting."""
    lines = []
    for ours, theirs in COMPARED:
        cells = []
        for limit in LIMITS:
            both = [chosen(result, name, limit) for name in (ours, theirs)]
            cells.append("{:+.0f} ± {:.0f}".format(*difference(result, *both)) if all(both) else "")
        if any(cells):
            lines.append([f"{ours} less {theirs}", *cells])
    return markdown(["points, 95 % interval", *COLUMNS], lines) if lines else ""


def at_equal_forgetting(result: dict, measure: Measure) -> str:
    """A row a method, a column a limit of forgetting."""
    before = f"{measure.of(result['base']):.{measure.digits}f}"
    rows = [["before training", before, *[""] * (len(LIMITS) - 1)]]
    for name in result["plan"]:
        if not points(result, name):
            continue
        found = values(result, name, measure)
        rows.append([name, *(spread(of_seeds, measure.digits) if of_seeds else "" for of_seeds in found)])
    return markdown(["forgotten", *COLUMNS], rows)


def curves(result: dict) -> dict[str, list[tuple[float, float]]]:
    """method -> (forgotten, new facts right %) of what `at_equal_forgetting` shows, means over the seeds."""
    found = {}
    for name in result["plan"]:
        picked = [seeds for limit in LIMITS if (seeds := chosen(result, name, limit))]
        at = {(mean(one.forgotten for one in s), mean(RIGHT.of(one.evaluation) for one in s)) for s in picked}
        if at:
            found[name] = sorted(at)
    return found


def _all_points(result: dict) -> str:
    rows = []
    for name in result["plan"]:
        for one in sorted(points(result, name)[:], key=lambda one: one[:3]):
            cells = [f"{measure.of(one.evaluation):.{measure.digits}f}" for measure in LEARNED]
            rows.append([name, f"{one.rate:g}", str(one.step), str(one.seed), f"{one.forgotten:.2f}", *cells])
    header = ["", "learning rate", "step", "seed", "forgotten, nats", *(measure.title for measure in LEARNED)]
    return markdown(header, rows)


def _listed(title: str, lines: list[str]) -> str:
    return "\n".join([title, "", *(f"- {line}" for line in lines)]) if lines else ""


def _setting(result: dict) -> str:
    s = result["settings"]
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value != "")
    starts = ", ".join(dict.fromkeys(f"{one['commit']} on {one['cpu']}" for one in result["starts"]))
    stops = ", ".join(f"{stop:g}" for stop in STOPS)
    return (
        f"{result['model']}; {machine}; started at {starts}.\n\n"
        f"A run is {s['epochs']} epochs of {s['steps'] // s['epochs']} steps, each of {s['facts_blocks']} "
        f"blocks of new facts and {s['prose_blocks']} of new prose, {s['length']} tokens per block: the same "
        f"batches in the same order for all methods. {s['people']} invented people have four facts each, and "
        f"the training text states each fact {s['rounds']} times. AdamW in float32. Each run is measured "
        f"after {stops} of its steps. Losses are nats per token; of several seeds, the mean and the range."
    )


def report(result: dict) -> str:
    """All tables, as Markdown."""
    answers = result["settings"]["answers"]
    diverged = [
        f"{run['method']}, learning rate {run['rate']:g}, seed {run['seed']}: {run['diverged']}"
        for run in result["runs"]
        if run["diverged"]
    ]
    parts = [
        "**A quick run. Its numbers mean nothing.**" if result["settings"].get("quick") else "",
        _setting(result),
        _listed("**This run is not finished.** Missing:", missing(result)),
        "Forgotten: the mean rise of the losses on the Python reference, on code of the standard library and "
        "on known facts. For each limit, the rate and the stop that have learned most by the validation "
        "questions; an empty cell: none that forgot so little had learned anything. New facts are queried in "
        f"phrasings that training did not have; guessing among the {answers} answers is right in "
        f"{100 / answers:.1f} %, with a loss of {math.log(answers):.2f}.",
        *(f"### {measure.title}\n\n{at_equal_forgetting(result, measure)}" for measure in LEARNED),
        f"### New facts, differences\n\n{apart}" if (apart := differences(result)) else "",
        f"### All points\n\n{_all_points(result)}",
        _listed("### Diverged, and not counted", diverged),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path) -> str:
    """Write tables and picture of the JSON file at ``path`` next to it; returns the tables."""
    result = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(report(result), encoding="utf-8")
    if found := curves(result):
        title = "New facts learned, by what was forgotten for them"
        trade_off(found, path.with_suffix(".png"), title, "forgotten, nats per token", "new facts right, %")
    return report(result)


if __name__ == "__main__":
    print(write(Path(sys.argv[-1])))
