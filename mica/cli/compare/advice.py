"""What would decide between methods that a comparison could not tell apart, and what that takes."""

import math
from typing import NamedTuple

from mica.cli.compare import schedule
from mica.cli.compare.schedule import Comparison
from mica.cli.compare.verdict import SEEDS, Lead, Verdict

_MOST_SEEDS = 64


class Needed(NamedTuple):
    """``seeds`` of both methods: the whole comparison then takes so many ``minutes``."""

    seeds: int
    minutes: int


def needed(comparison: Comparison, found: Verdict, method: str) -> Needed | None:
    """How many seeds would make the lead of the best over ``method`` certain if it is as large as it looks.

    None where no number of seeds would, or none that anybody will want to wait for.
    """
    lead = found.lead[method]
    shared = min(len(found.choices[name].seeds) for name in (found.best, method))
    for seeds in range(shared, _MOST_SEEDS + 1):
        if lead.mean > _with_seeds(lead, shared, seeds).half:
            seconds = _seconds(comparison, found, method, seeds)
            return Needed(seeds, math.ceil(seconds / 60))
    return None


def _with_seeds(lead: Lead, shared: int, seeds: int) -> Lead:
    """The ``lead`` with another number of seeds than the two methods share now.

    A seed of both methods adds one degree of freedom to the residual of the two-way layout.
    """
    parts = []
    for part in lead.parts:
        if part.source == SEEDS and part.degrees:
            part = part._replace(
                variance=part.variance * shared / seeds, degrees=part.degrees + seeds - shared
            )
        parts.append(part)
    return lead._replace(parts=tuple(parts))


def _seconds(comparison: Comparison, found: Verdict, method: str, seeds: int) -> float:
    """What the comparison has taken, and what more seeds would."""
    seconds = 0.0
    costs = comparison.costs(schedule.WHOLE, schedule.SEEDS)
    for name in (found.best, method):
        choice = found.choices[name]
        each = costs[name].seconds(choice.steps, comparison.question.whole_blocks)
        seconds += (seeds - len(choice.seeds)) * each
    return comparison.spent() + seconds / comparison.base["jobs"]


def missing(lead: Lead) -> list[str]:
    """The parts of the error of which nothing is known, so that nothing can be said of the difference."""
    return [part.source for part in lead.parts if not part.degrees]
