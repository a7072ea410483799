"""What a training has learned and forgotten at its end, and what that is worth at equal forgetting.

*Learned* is the fall of the loss on held-out text, *forgotten* its rise on the retained text, in nats per
token, since before the training. Held-out blocks are divided: those of "validation" choose rates and the
limit, those of "test" are reported. Only ends of trainings count: nobody can train a model again that is a
stop in the middle of a schedule.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

Result = dict[str, Any]  # of a training: see `mica.cli.compare.training.train`
# The retained blocks, in two sets: short trainings are measured on the first, and on no block of the test.
RETAINED = ("retained", "retained, the rest")


class Limit(NamedTuple):
    """A limit of forgetting: ``value``, nats per token.

    ``blocks``: what the training that sets it has forgotten of each retained block, (blocks,); None for a
    number that is given.
    """

    value: float
    blocks: np.ndarray | None = None


ANY = Limit(math.inf)


class Outcome(NamedTuple):
    """The end of a training, against the model before it.

    ``validation``: learned, the mean over its blocks. ``learned``, ``forgotten``: (blocks,) of the test and
    of the retained text. ``share``: of the update that is kept, see `within`. ``doubt``: (retained blocks,),
    how far each of them has moved the mean of ``learned`` through ``share``; 0 where ``share`` is 1.
    """

    validation: float
    learned: np.ndarray
    forgotten: np.ndarray
    share: float = 1.0
    doubt: np.ndarray | float = 0.0

    def within(self, limit: Limit) -> "Outcome":
        """The same, or what is left of it where the update is scaled back to the ``limit`` of forgetting.

        What is left lies on the line to the model before the training. An adapter can be scaled so, and then
        it loses less of what was learned than that line. A rule with a jump, like "before the limit is
        passed", makes noise of forgetting decide.
        """
        forgotten = self.forgotten.mean()
        if forgotten <= limit.value:
            return self
        share = limit.value / forgotten
        doubt = 1 - self.forgotten / forgotten
        if limit.blocks is not None and limit.value:
            doubt = doubt + limit.blocks / limit.value - 1
        learned = share * self.learned
        if len(learned):
            doubt = doubt * learned.mean()
        return Outcome(share * self.validation, learned, share * self.forgotten, share, doubt)


def outcome(base: Result, run: Result) -> Outcome:
    """The outcome of a training that came to its end."""
    end = run["points"][-1]

    def rise(*names: str) -> np.ndarray:
        changes = [np.subtract(end[name], base[name]) for name in names if name in end]
        return np.concatenate([[], *changes])

    return Outcome(-float(rise("validation").mean()), -rise("test"), rise(*RETAINED))


class Choice(NamedTuple):
    """The training of a method that has learned most within a limit; ``seeds``: of each seed its outcome.

    It was chosen by that of seed 0.
    """

    rate: float
    steps: int
    seeds: dict[int, Outcome]

    @property
    def first(self) -> Outcome:
        return self.seeds[0]

    def mean(self, name: str) -> float:
        """The mean over all seeds of a field of their outcomes."""
        return float(np.mean([getattr(end, name) for end in self.seeds.values()]))


def choose(base: Result, runs: Iterable[Result], limit: Limit) -> Choice | None:
    """The choice among ``runs`` of one method, by their first seed; None if none has learned anything."""
    ends = [(run, outcome(base, run).within(limit)) for run in runs if run["points"]]
    firsts = [(run, end) for run, end in ends if run["seed"] == 0 and end.validation > 0]
    if not firsts:
        return None
    best, _ = max(firsts, key=lambda pair: pair[1].validation)
    rate, steps = best["rate"], best["steps"]
    seeds = {run["seed"]: end for run, end in ends if (run["rate"], run["steps"]) == (rate, steps)}
    return Choice(rate, steps, dict(sorted(seeds.items())))


def choose_each(base: Result, runs: dict[str, list[Result]], limit: Limit) -> dict[str, Choice]:
    """The choice of each method that has learned anything."""
    found = {method: choose(base, some, limit) for method, some in runs.items()}
    return {method: choice for method, choice in found.items() if choice is not None}


def common_limit(base: Result, runs: dict[str, list[Result]]) -> Limit:
    """The forgetting at which methods are compared: what the middle one of them forgets to learn most.

    Of an even number, the lower of the two in the middle. At least 0: some texts help each other.
    """
    chosen = sorted(choose_each(base, runs, ANY).values(), key=lambda choice: choice.mean("forgotten"))
    if not chosen:
        return Limit(0.0)
    middle = chosen[(len(chosen) - 1) // 2]
    blocks = np.mean([end.forgotten for end in middle.seeds.values()], axis=0)
    if blocks.mean() <= 0:
        return Limit(0.0)
    return Limit(float(blocks.mean()), blocks)
