"""Tables of a result of `bench.quality`: ``python -m bench.quality.report FILE.json`` writes them beside it.

All that is printed follows from the file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from bench.quality.schedule import chosen_rate, is_enclosed, missing, tried, verdict


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
    """Mean and range over the seeds."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        middle, low, high = (f"{round(value, digits) + 0.0:.{digits}f}" for value in self)  # no -0.0
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


def after(result: dict, method: str, measure: Measure) -> Spread | None:
    """None where no learning rate converged."""
    values = [measure.of(run["evaluation"]) for run in chosen_runs(result, method)]
    return Spread(mean(values), min(values), max(values)) if values else None


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _measures(result: dict, measures: tuple[Measure, ...]) -> str:
    rows = [["before", "", *(f"{m.of(result['base']):.{m.digits}f}" for m in measures)]]
    for name in trained_methods(result):
        cells = [after(result, name, m).text(m.digits) for m in measures]
        rows.append([name, str(len(chosen_runs(result, name))), *cells])
    return table(["", "seeds", *(m.title for m in measures)], rows)


def _tries(result: dict) -> str:
    rows = []
    for name in result["methods"]:
        chosen, losses = chosen_rate(result, name), []
        for rate, loss in sorted(tried(result, name).items()):
            text = f"{rate:g}: {loss:.3f}" if math.isfinite(loss) else f"{rate:g}: diverged"
            losses.append(f"**{text}**" if rate == chosen else text)
        rows.append([name, ", ".join(losses), verdict(result, name)])
    return table(["", "learning rate: validation loss", "the chosen one"], rows)


def page_table(result: dict) -> str:
    """The table of `bench/README.md`; a method without a result has no row."""
    shown = (PICKED, FACTS, PROSE, REFERENCE, KNOWN)
    header = ["", "trained", "learning rate", "enclosed"]
    header += [f"{m.title} (before: {m.of(result['base']):.{m.digits}f})" for m in shown]
    rows = []
    for name in trained_methods(result):
        facts, rates = result["methods"][name], tried(result, name)
        label = f"{name}, " + (f"r = {facts['rank']}" if facts["rank"] else "all weights")
        cells = [f"{facts['trained_parameters'] / 1e6:.1f} M", f"{chosen_rate(result, name):g}"]
        cells.append("yes" if is_enclosed(rates) else "no")
        rows.append([label, *cells, *(after(result, name, m).text(m.digits) for m in shown)])
    return table(header, rows)


def _listed(title: str, lines: list[str]) -> str:
    return "\n".join([title, "", *(f"- {line}" for line in lines)]) if lines else ""


def _setting(result: dict) -> str:
    s = result["settings"]
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value != "")
    commits = ", ".join(dict.fromkeys(start["commit"] for start in result["starts"]))  # of every start
    return (
        f"{result['model']}; {machine}; commit {commits}.\n\n"
        f"A run is {s['epochs']} epochs of {s['steps'] // s['epochs']} steps, each of {s['facts_blocks']} "
        f"blocks of new facts and {s['prose_blocks']} of new prose, {s['length']} tokens per block: the same "
        f"batches in the same order for all methods. {s['people']} invented people have four facts each, and "
        f"the training text states each fact {s['rounds']} times. AdamW in float32. Learning rates: those of "
        "the recipe's range, then beyond the best one while that is at an edge, at most "
        f"{s['tries']}, with the first seed, chosen on validation text. Of several seeds, the mean and, in "
        "brackets, the range. Losses are nats per token."
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
        f"### Learned\n\n{_measures(result, LEARNED)}\n\nNew facts are queried in phrasings that training "
        f"did not have. Among answers: only the {answers} of the attribute are possible, all equally "
        f"frequent; guessing gives a loss of {math.log(answers):.3f} and {100 / answers:.1f} %. The loss of "
        "the answer among all words also falls by learning the form of such sentences.",
        f"### Forgotten\n\n{_measures(result, FORGOTTEN)}",
        f"### Learning rates\n\n{_tries(result)}",
        _listed("### Diverged, and not counted", diverged),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path) -> str:
    """Write the tables of the JSON file at ``path`` next to it; returns them."""
    text = report(json.loads(path.read_text(encoding="utf-8")))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    print(write(Path(sys.argv[-1])))
