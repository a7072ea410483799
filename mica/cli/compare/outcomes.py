"""What trainings have learned and forgotten at their ends, in nats per token, and how far that varies."""

import math
from collections.abc import Iterable
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

Result = dict[str, Any]  # of a training: see `mica.cli.compare.trainings.Trainings.make`


class Outcome(NamedTuple):
    """How the losses at the end of a training differ from those of the model before it.

    ``validation``: by how much the mean loss has fallen on the blocks that decide about learning rates.
    ``changes``: the change of each block's loss, (blocks,): under "learned" by how much it has fallen on the
    blocks of the test, under "forgotten" by how much it has risen on the retained ones.
    """

    validation: float
    changes: dict[str, np.ndarray]

    @property
    def means(self) -> list[float]:
        """The means over all blocks: what was learned, and what was forgotten."""
        return [float(blocks.mean()) for blocks in self.changes.values()]


def outcome(base: Result, run: Result) -> Outcome:
    """The outcome of a training that came to its end. ``base``: what was measured before all."""

    def rise(name: str) -> np.ndarray:
        return np.subtract(run["losses"][name], base["losses"][name])

    return Outcome(-rise("validation").mean(), {"learned": -rise("test"), "forgotten": rise("retained")})


class Found(NamedTuple):
    """What the trainings of a method have shown.

    ``curve``: the outcome of the first seed at each learning rate, ascending. ``rate``: the learning rate at
    which it learned most of the validation blocks. ``seeds``: the outcomes of all seeds at this rate.
    """

    curve: dict[float, Outcome]
    rate: float
    seeds: dict[int, Outcome]

    @property
    def each(self) -> np.ndarray:
        """(seeds, 2): what each has learned and forgotten."""
        return np.array([end.means for end in self.seeds.values()])


def find(base: Result, runs: Iterable[Result]) -> Found:
    """What the whole trainings of a method show."""
    runs = sorted(runs, key=lambda run: (run["rate"], run["seed"]))
    curve = {run["rate"]: outcome(base, run) for run in runs if run["seed"] == 0}
    best = max(curve, key=lambda rate: curve[rate].validation)
    return Found(curve, best, {run["seed"]: outcome(base, run) for run in runs if run["rate"] == best})


def between_documents(found: Iterable[Found], amount: str, documents: list[int]) -> float:
    """How far other documents would move the difference of two methods: the largest of all pairs.

    That is the standard error over documents, which weigh by their blocks; ``documents``: of each block.
    NaN where there are not two documents and two methods.
    """
    _, which = np.unique(documents, return_inverse=True)
    count = which.max() + 1
    blocks = [np.mean([end.changes[amount] for end in one.seeds.values()], axis=0) for one in found]
    if count < 2:
        return math.nan
    errors = []
    for ours, theirs in combinations(blocks, 2):
        difference = ours - theirs
        added = np.bincount(which, difference - difference.mean()) / len(difference)
        errors.append(math.sqrt(np.square(added).sum() * count / (count - 1)))
    return max(errors, default=math.nan)
