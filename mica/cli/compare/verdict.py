"""Who learned more at equal forgetting, by how much, and how sure that is.

Two methods are compared on the same blocks, so the interval of their difference is that of the mean of the
differences, block by block, and of the seeds: the variance between the seeds of one training is taken as the
same for all methods, since each has few. Student's t, with Welch's degrees of freedom. Without a second seed
of anything nothing is claimed. As every pair could have been the one that differs, each interval is at
1 - 5 % / (number of pairs): all of them hold at once in 95 % of comparisons (Bonferroni).
"""

import math
from statistics import mean, variance
from typing import NamedTuple

from scipy.stats import t as student_t

from mica.cli.compare.curves import Choice, Result, choose, common_limit

_LEVEL = 0.05


class Estimate(NamedTuple):
    """``mean`` ± ``half``, nats per token; ``half`` is infinite where nothing can be said."""

    mean: float
    half: float

    @property
    def is_certain(self) -> bool:
        """Whether it is above 0."""
        return self.mean > self.half


class Verdict(NamedTuple):
    """Of the methods at a ``limit`` of forgetting.

    ``choices``, ``learned``: of those that learned anything, the best first. ``lead``: of the best over each
    other one.
    """

    limit: float
    choices: dict[str, Choice]
    learned: dict[str, Estimate]
    lead: dict[str, Estimate]

    @property
    def best(self) -> str | None:
        return next(iter(self.choices), None)

    @property
    def tied(self) -> list[str]:
        """The methods that may be as good as the best."""
        return [method for method, lead in self.lead.items() if not lead.is_certain]


def verdict(base: Result, runs: dict[str, list[Result]], limit: float | None = None) -> Verdict:
    """The verdict on ``runs``, by method. ``limit``: by default `common_limit`."""
    if limit is None:
        limit = common_limit(base, runs)
    found = {method: choose(base, some, limit) for method, some in runs.items()}
    found = {method: choice for method, choice in found.items() if choice is not None}
    choices = dict(sorted(found.items(), key=lambda item: -mean(_blocks(item[1]))))
    spread = _between_seeds(choices.values())
    learned = {}
    lead = {}
    pairs = max(1, math.comb(len(choices), 2))
    for method, choice in choices.items():
        learned[method] = _estimate(_blocks(choice), [choice], spread, _LEVEL)
        if len(learned) > 1:
            best = next(iter(choices.values()))
            gaps = [ours - theirs for ours, theirs in zip(_blocks(best), _blocks(choice), strict=True)]
            lead[method] = _estimate(gaps, [best, choice], spread, _LEVEL / pairs)
    return Verdict(limit, choices, learned, lead)


def _blocks(choice: Choice) -> list[float]:
    """Learned on each block of the test, the mean over the seeds."""
    return [mean(of_seeds) for of_seeds in zip(*(point.test for point in choice.points), strict=True)]


class _Spread(NamedTuple):
    """Variance between the seeds of a training, and its degrees of freedom."""

    variance: float
    degrees: int


def _between_seeds(choices) -> _Spread:
    squares = 0.0
    degrees = 0
    for choice in choices:
        means = [mean(point.test) for point in choice.points]
        if len(means) > 1:
            squares += variance(means) * (len(means) - 1)
            degrees += len(means) - 1
    return _Spread(squares / max(1, degrees), degrees)


def _estimate(blocks: list[float], choices: list[Choice], spread: _Spread, level: float) -> Estimate:
    """The mean of ``blocks``, which ``choices`` have given, and half of its interval at 1 - ``level``."""
    if len(blocks) < 2 or not spread.degrees:
        return Estimate(mean(blocks), math.inf)
    of_blocks = variance(blocks) / len(blocks)
    of_seeds = spread.variance * sum(1 / len(choice.points) for choice in choices)
    total = of_blocks + of_seeds
    if not total:
        return Estimate(mean(blocks), 0.0)
    degrees = total**2 / (of_blocks**2 / (len(blocks) - 1) + of_seeds**2 / spread.degrees)
    return Estimate(mean(blocks), float(student_t.ppf(1 - level / 2, degrees)) * math.sqrt(total))
