"""Who learned more at equal forgetting, by how much, and how sure that is.

Two methods are compared on the same blocks and by the same seeds, which give both the same batches in the
same order. The interval of their difference is that of the mean of the differences, block by block, and of
what a seed changes for one method and not for the other: the variance that methods and seeds do not explain
by themselves (the residual of a two-way layout), taken as the same for all methods, since each has few seeds.
Student's t, with Welch's degrees of freedom. Unless two methods have second seeds, nothing is claimed. As
every pair could have been the one that differs, each interval is at 1 - 5 % / (number of pairs): all of them
hold at once in 95 % of comparisons (Bonferroni).
"""

import math
from collections.abc import Iterable
from statistics import mean, variance
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from mica.cli.compare.curves import Choice, Result, choose, common_limit

_LEVEL = 0.05
# Degrees of freedom of the seeds from which on Welch's formula holds the level: with identical methods (800
# comparisons each) a difference was claimed in 1 to 6 %, with 1 degree in up to 13 %.
_ENOUGH = 3


class Estimate(NamedTuple):
    """``mean`` ± ``half``, nats per token; ``half`` is infinite where nothing can be said."""

    mean: float
    half: float

    @property
    def is_certain(self) -> bool:
        """Whether it is above 0."""
        return self.mean > self.half


class _Spread(NamedTuple):
    """A variance, and its degrees of freedom."""

    variance: float
    degrees: int


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
    residual = _residual(choices.values())
    pairs = max(1, math.comb(len(choices), 2))
    lead = {}
    for method, choice in list(choices.items())[1:]:
        best = next(iter(choices.values()))
        both = sorted(best.seeds.keys() & choice.seeds.keys())
        blocks = zip(_blocks(best, both), _blocks(choice, both), strict=True)
        gaps = [ours - theirs for ours, theirs in blocks]
        lead[method] = _estimate(gaps, residual, 2 / len(both), _LEVEL / pairs)
    return Verdict(limit, choices, learned_by(choices), lead)


def learned_by(choices: dict[str, Choice]) -> dict[str, Estimate]:
    """What each of some trainings has learned, with its own interval."""
    between = _between_seeds(choices.values())
    learned = {}
    for method, choice in choices.items():
        learned[method] = _estimate(_blocks(choice), between, 1 / len(choice.seeds), _LEVEL)
    return learned


def _blocks(choice: Choice, seeds: Iterable[int] | None = None) -> list[float]:
    """Learned on each block of the test, the mean over ``seeds``, by default all."""
    points = [choice.seeds[seed] for seed in (choice.seeds if seeds is None else seeds)]
    return [mean(of_seeds) for of_seeds in zip(*(point.test for point in points), strict=True)]


def _between_seeds(choices: Iterable[Choice]) -> _Spread:
    """Between the seeds of a training."""
    squares = 0.0
    degrees = 0
    for choice in choices:
        means = [mean(point.test) for point in choice.seeds.values()]
        if len(means) > 1:
            squares += variance(means) * (len(means) - 1)
            degrees += len(means) - 1
    return _Spread(squares / max(1, degrees), degrees)


def _residual(choices: Iterable[Choice]) -> _Spread:
    """What neither method nor seed explains of what a training has learned, by least squares."""
    cells = []
    for method, choice in enumerate(choices):
        cells += [(method, seed, mean(point.test)) for seed, point in choice.seeds.items()]
    methods = len({method for method, _, _ in cells})
    seeds = sorted({seed for _, seed, _ in cells})
    design = np.zeros((len(cells), methods + len(seeds)))
    for row, (method, seed, _) in enumerate(cells):
        design[row, method] = 1
        design[row, methods + seeds.index(seed)] = 1
    learned = np.array([value for _, _, value in cells])
    fit, _, rank, _ = np.linalg.lstsq(design, learned, rcond=None)
    degrees = len(cells) - int(rank)
    return _Spread(float(np.square(learned - design @ fit).sum()) / max(1, degrees), degrees)


def _estimate(blocks: list[float], spread: _Spread, share: float, level: float) -> Estimate:
    """The mean of ``blocks``, and half of its interval at 1 - ``level``.

    ``share``: of the variance ``spread`` that this mean has beside that between its blocks.
    """
    if len(blocks) < 2 or not spread.degrees:
        return Estimate(mean(blocks), math.inf)
    of_blocks = variance(blocks) / len(blocks)
    of_seeds = spread.variance * share
    total = of_blocks + of_seeds
    if not total:
        return Estimate(mean(blocks), 0.0)
    degrees = spread.degrees
    if degrees >= _ENOUGH:
        degrees = total**2 / (of_blocks**2 / (len(blocks) - 1) + of_seeds**2 / degrees)
    return Estimate(mean(blocks), float(student_t.ppf(1 - level / 2, degrees)) * math.sqrt(total))
