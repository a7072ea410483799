"""What would decide between methods that a comparison could not tell apart, and what that takes."""

import math
from typing import NamedTuple

from mica.cli.compare import schedule
from mica.cli.compare.schedule import Question, Results
from mica.cli.compare.verdict import FEWEST, HELD_OUT, RETAINED_DOCUMENTS, SEEDS, Lead, Part, Verdict

_MOST_SEEDS = 64
_TIMES_DOCUMENTS = (1, 2, 4, 8, 16)


class Needed(NamedTuple):
    """``documents`` times as many documents, and ``seeds`` of both methods: so many ``minutes`` in all."""

    documents: int
    seeds: int
    minutes: int


def needed(question: Question, results: Results, found: Verdict, method: str) -> Needed | None:
    """What would make the lead of the best over ``method`` certain if it is as large as it looks.

    None if that is more than anybody will want to do, or where there are no second seeds yet: the spread is
    not known then.
    """
    lead = found.lead[method]
    both = [found.choices[found.best], found.choices[method]]
    shared = min(len(choice.seeds) for choice in both)
    if not all(part.degrees for part in lead.parts if part.source == SEEDS):
        return None
    ways = []
    for documents in _TIMES_DOCUMENTS:
        for seeds in range(shared, _MOST_SEEDS + 1):
            if lead.mean > _half(lead, documents, seeds / shared, seeds - shared):
                seconds = _seconds(question, results, found, method, documents, seeds)
                ways.append(Needed(documents, seeds, math.ceil(seconds / 60)))
                break
    return min(ways, key=lambda way: way.minutes, default=None)


def _half(lead: Lead, documents: int, times_seeds: float, more_seeds: int) -> float:
    """Half of the interval with so many times the documents and seeds.

    A seed of both methods adds one degree of freedom to the residual of the two-way layout.
    """
    parts = []
    for part in lead.parts:
        if part.source == SEEDS:
            parts.append(Part(part.source, part.variance / times_seeds, part.degrees + more_seeds))
        elif part.degrees:
            degrees = documents * (part.degrees + 1) - 1
            parts.append(Part(part.source, part.variance / documents, degrees))
        else:
            return math.inf
    return lead._replace(parts=tuple(parts)).half


def _seconds(
    question: Question, results: Results, found: Verdict, method: str, documents: int, seeds: int
) -> float:
    """What the comparison has taken, and what more seeds and blocks would."""
    seconds = 0.0
    for name in (found.best, method):
        choice = found.choices[name]
        cost = schedule.cost_of(results, name, schedule.WHOLE, schedule.SEEDS)
        seconds += (seeds - len(choice.seeds)) * cost.whole(question, choice.steps)
    for run in results.values():
        if run["phase"] >= schedule.WHOLE:
            seconds += (documents - 1) * question.whole_blocks * run.get("block_seconds", 0.0)
    jobs = results[schedule.BASE]["jobs"]
    return max(run["ended"] for run in results.values()) + seconds / jobs


def missing(lead: Lead) -> list[str]:
    """Why nothing at all can be said of a difference, and what to do, a reason each."""
    few = f"blocks are of fewer than {FEWEST} documents"
    reasons = {
        HELD_OUT: f"the held-out {few} (more: --eval-blocks, --held-out, a text of shorter documents)",
        RETAINED_DOCUMENTS: f"the retained {few} (more: --eval-blocks, --retain)",
        SEEDS: "no two methods have second seeds (more: --budget, --seeds)",
    }
    return [reasons[part.source] for part in lead.parts if not part.degrees]
