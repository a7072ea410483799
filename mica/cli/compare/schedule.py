"""Which trainings a comparison does, in an order that follows from what was measured, never from a clock.

1. The loss before all, and four steps of each method, to see what they cost and that they fit in memory.
2. A training of each method at each of its learning rates.
3. Further seeds of each method at its best rate: the second of all methods, then the third, ...

All trainings of 2 and 3 have the same number of steps. It follows from the budget and from seconds that are
in the results, so that a comparison that was killed goes on as it would have; once there is such a training,
all others are as long, also with another budget.
"""

import math
from statistics import median_low
from typing import NamedTuple

from mica.cli.compare.outcomes import Found, Result, find
from mica.errors import UsageError

Results = dict[str, Result]  # by `Planned.key`
BASE = "base"
TRIAL, RATES, SEEDS = 1, 2, 3  # phases
_TRIED = 4  # steps that show what a step costs
LEAST = 32  # steps of a training: rather fewer seeds
_FULLEST = 0.93  # of the budget is planned: steps vary by a tenth from one start to the next
_MARGIN = 1.2  # of a budget that is named, for the same reason


class Planned(NamedTuple):
    """A training to do; with `BASE` as its method, the measurement of the model before any training."""

    phase: int
    method: str
    rate: float = 0.0
    steps: int = 0
    seed: int = 0

    @property
    def key(self) -> str:
        """The name under which its result is kept."""
        if self.method == BASE:
            return BASE
        return f"{self.phase}-{self.method}-{self.rate:g}-{self.steps}-{self.seed}"


class Comparison(NamedTuple):
    """What is to be compared, and the results so far; what is done next follows from both.

    ``rates``: the learning rates of each method, ascending. ``seeds``: how many each method has at its best
    rate. ``budget``: seconds for everything. ``length``: the steps of a training, or None if the budget
    decides. ``longest``: how many steps the text allows. ``blocks``: how many are measured after a training.
    """

    rates: dict[str, list[float]]
    seeds: int
    budget: float
    length: int | None
    longest: int
    blocks: int
    results: Results

    @property
    def base(self) -> Result:
        """What was measured before all trainings."""
        return self.results[BASE]

    def next(self) -> Planned | None:
        """What is to be done next: the first that is `left`.

        None if nothing is left, or if it would not end within the budget. The first steps of each method are
        always done.
        """
        for planned in self.left():
            if planned.phase == TRIAL or self.spent() + self.seconds(planned) <= self.budget:
                return planned
            return None

    def left(self) -> list[Planned]:
        """What is left of the phase that is under way, in order; empty at the end of the last one.

        Raises UsageError as `steps`.
        """
        for phase in (self._trials, self._at_rates, self._seeds):
            left = [planned for planned in phase() if planned.key not in self.results]
            if left:
                return left
        return []

    def minutes_for(self, left: list[Planned]) -> int:
        """A budget in minutes that suffices for these trainings, too."""
        seconds = self.spent() + sum(map(self.seconds, left))
        return math.ceil(_MARGIN * seconds / 60)

    def whole(self) -> dict[str, list[Result]]:
        """The trainings of full length that came to their end, by method, where it has any."""
        return self._by_method(RATES, SEEDS)

    def found(self) -> dict[str, Found]:
        """What each method of `whole` has done."""
        return {method: find(self.base, runs) for method, runs in self.whole().items()}

    def failed(self) -> dict[str, str]:
        """Why trainings did not come to their end, by the key of each."""
        return {key: run["failed"] for key, run in self.results.items() if run["failed"]}

    def spent(self) -> float:
        """Seconds on the clock when the last result was there."""
        return max((run["ended"] for run in self.results.values()), default=0.0)

    def seconds(self, planned: Planned) -> float:
        """How long a training takes: the median of its method, else by the first steps."""
        others = self.whole().get(planned.method)
        if others:
            return median_low(run["seconds"] for run in others)
        beside, step = self._costs()[planned.method]
        return beside + planned.steps * step

    def _by_method(self, *phases: int) -> dict[str, list[Result]]:
        found = {method: [] for method in self.rates}
        for run in self.results.values():
            if run["method"] in found and run["phase"] in phases and run["failed"] is None:
                found[run["method"]].append(run)
        return {method: some for method, some in found.items() if some}

    def _trials(self) -> list[Planned]:
        lowest = [Planned(TRIAL, method, rates[0], _TRIED) for method, rates in self.rates.items()]
        return [Planned(TRIAL, BASE), *lowest]

    def _at_rates(self) -> list[Planned]:
        """The first rate of each method, then the second one, ..."""
        planned = []
        for method in self._by_method(TRIAL):
            planned += [Planned(RATES, method, rate, self.steps()) for rate in self.rates[method]]
        return sorted(planned, key=lambda each: self.rates[each.method].index(each.rate))

    def _seeds(self) -> list[Planned]:
        planned = []
        for seed in range(1, self.seeds):
            for method, found in self.found().items():
                planned.append(Planned(SEEDS, method, found.rate, self.steps(), seed))
        return planned

    def _costs(self) -> dict[str, tuple[float, float]]:
        """What a training of each method costs, by its first steps.

        These are two numbers of seconds: what a training takes in addition to its steps, and a step.
        """
        measuring = self.blocks * self.base["block_seconds"]
        trials = self._by_method(TRIAL)
        return {
            method: (run["start_seconds"] + measuring, run["step_seconds"])
            for method, (run,) in trials.items()
        }

    def steps(self) -> int:
        """How many steps a training has: as many as those that were done, else what the budget allows.

        Raises UsageError if the budget is too short for one at each rate.
        """
        for run in self.results.values():
            if run["phase"] > TRIAL:
                return run["steps"]

        costs = self._costs()
        least = self.length or min(LEAST, self.longest)
        left = _FULLEST * self.budget - self.spent()
        for seeds in range(self.seeds, 0, -1):  # rather fewer seeds than fewer steps
            beside = each_step = 0.0
            for method, (of_training, of_step) in costs.items():
                number = len(self.rates[method]) + seeds - 1
                beside += number * of_training
                each_step += number * of_step
            steps = math.floor((left - beside) / each_step)
            if steps >= least:
                return min(steps, self.length or self.longest)

        seconds = self.spent() + beside + least * each_step
        minutes = math.ceil(_MARGIN * seconds / _FULLEST / 60)
        raise UsageError(
            f"--budget {self.budget / 60:g}: too short for {least} steps at each learning rate: "
            f"--resume --budget {minutes} goes on, with what has been measured"
        )
