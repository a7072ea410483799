"""Who learned more at equal forgetting, by how much, and how sure that is.

Two methods are compared on the same blocks and by the same seeds, which give both the same batches in the
same order. Another comparison would have other documents in the held-out text, others in the retained text,
and other seeds. So the error of a difference has three parts:

- *held-out documents*: of the differences, block by block. Blocks of one document are not independent, so
  the unit is the document.
- *retained documents*: where an update is scaled back to the limit of forgetting, its share follows from
  what was measured of forgetting (`outcomes.Outcome.doubt`, to first order). The unit is the document, too.
- *seeds*: what a seed changes for one method and not for the other: the variance that methods and seeds do
  not explain by themselves (the residual of a two-way layout), the same for all methods, as each has few.

Each part has few degrees of freedom, in a comparison of half an hour often one or two. The interval is the
root of the sum of squares of the three intervals that Student's t gives with each part's own degrees. With
identical methods that claimed a difference in 0 to 4 % of simulated comparisons, whatever part is largest
(`bench.claims`). Satterthwaite's degrees for the sum do not hold the level where two methods have two
seeds each: now and then two seeds happen to agree, and then the sum takes the degrees of the other parts. A
bootstrap of two seeds or four documents has nothing to draw from.

Fewer than `FEWEST` documents, or no second seeds of two methods, make the interval infinite. As every pair
could have been the one that differs, each interval is at 1 - 5 % / (number of pairs): all of them hold at
once in 95 % of comparisons (Bonferroni).
"""

import math
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from mica.cli.compare.outcomes import RETAINED, Choice, Result, choose_each, common_limit

_LEVEL = 0.05
FEWEST = 3  # documents: of two nobody can say how documents differ
HELD_OUT = "held-out documents"
RETAINED_DOCUMENTS = "retained documents"
SEEDS = "seeds"


class Part(NamedTuple):
    """A part of the error of a difference: its variance, and degrees of freedom (0: unknown)."""

    source: str
    variance: float
    degrees: float

    def half(self, level: float) -> float:
        """Half of the interval at 1 - ``level`` that this part alone would give."""
        if not self.degrees:
            return math.inf
        return float(student_t.ppf(1 - level / 2, self.degrees)) * math.sqrt(self.variance)


class Lead(NamedTuple):
    """A difference of two methods, nats per token: its ``mean``, and the parts of its error."""

    mean: float
    parts: tuple[Part, ...]
    level: float

    @property
    def half(self) -> float:
        """Half of its interval; infinite where nothing can be said."""
        return math.hypot(*(part.half(self.level) for part in self.parts))

    @property
    def is_certain(self) -> bool:
        """Whether it is above 0."""
        return self.mean > self.half

    @property
    def doubt(self) -> str:
        """The source of most of its error."""
        return max(self.parts, key=lambda part: part.half(self.level)).source


class Verdict(NamedTuple):
    """Of the methods at a ``limit`` of forgetting.

    ``choices``: of those that learned anything, the best first. ``lead``: of the best over each other one.
    """

    limit: float
    choices: dict[str, Choice]
    lead: dict[str, Lead]

    @property
    def best(self) -> str | None:
        return next(iter(self.choices), None)


def verdict(base: Result, runs: dict[str, list[Result]]) -> Verdict:
    """The verdict on ``runs``, by method, at their `common_limit`.

    ``base["documents"]`` names the document of each block, by set of blocks.
    """
    limit = common_limit(base, runs)
    found = choose_each(base, runs, limit)
    choices = dict(sorted(found.items(), key=lambda item: -item[1].mean("learned")))
    residual = _residual(choices.values())
    level = _LEVEL / max(1, math.comb(len(choices), 2))
    best, *others = choices or [None]
    lead = {other: _lead(base, choices[best], choices[other], residual, level) for other in others}
    return Verdict(limit.value, choices, lead)


def _lead(base: Result, best: Choice, other: Choice, residual: Part, level: float) -> Lead:
    """Of ``best`` over ``other``, by the seeds that both have."""
    seeds = sorted(best.seeds.keys() & other.seeds.keys())
    pairs = [(best.seeds[seed], other.seeds[seed]) for seed in seeds]
    gaps = np.mean([ours.learned - theirs.learned for ours, theirs in pairs], axis=0)
    parts = [_of_documents(HELD_OUT, gaps, _documents(base, ["test"]))]
    if any(end.share < 1 for end in chain.from_iterable(pairs)):
        doubts = sum(ours.doubt - theirs.doubt for ours, theirs in pairs) / len(pairs)
        parts.append(_of_documents(RETAINED_DOCUMENTS, doubts, _documents(base, RETAINED)))
    parts.append(residual._replace(variance=residual.variance * 2 / len(seeds)))
    return Lead(float(gaps.mean()), tuple(parts), level)


def _documents(base: Result, names: Iterable[str]) -> list:
    """The document of each block of these sets."""
    return [document for name in names for document in base["documents"][name]]


def _of_documents(source: str, blocks: np.ndarray, documents: list) -> Part:
    """The variance of the mean of ``blocks``, (blocks,), whose unit is the document.

    Documents weigh by their number of blocks. Where the blocks of a document are all alike, the expected sum
    of squares of what documents add to the mean is ``unbiased`` / ``concentration`` of the variance; where
    they are less alike, the variance comes out too large rather than too small. The degrees are those of as
    many documents of equal size as have this ``concentration``.
    """
    _, which = np.unique(documents, return_inverse=True)
    weights = np.bincount(which) / len(blocks)
    added = np.bincount(which, blocks - blocks.mean()) / len(blocks)
    if len(weights) < FEWEST:
        return Part(source, 0.0, 0)
    concentration = np.square(weights).sum()
    unbiased = concentration - 2 * np.power(weights, 3).sum() + concentration**2
    variance = np.square(added).sum() * concentration / unbiased
    return Part(source, float(variance), float(1 / concentration - 1))


def _residual(choices: Iterable[Choice]) -> Part:
    """What neither method nor seed explains of what a training has learned, by least squares."""
    cells = []
    for method, choice in enumerate(choices):
        cells += [(method, seed, end.learned.mean()) for seed, end in choice.seeds.items()]
    methods = len({method for method, _, _ in cells})
    seeds = sorted({seed for _, seed, _ in cells})
    design = np.zeros((len(cells), methods + len(seeds)))
    for row, (method, seed, _) in enumerate(cells):
        design[row, method] = 1
        design[row, methods + seeds.index(seed)] = 1
    learned = np.array([value for _, _, value in cells])
    fit, _, rank, _ = np.linalg.lstsq(design, learned, rcond=None)
    degrees = len(cells) - int(rank)
    return Part(SEEDS, float(np.square(learned - design @ fit).sum()) / max(1, degrees), degrees)
