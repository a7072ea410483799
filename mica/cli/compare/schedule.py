"""Which trainings a comparison does, in an order that follows from what was measured, never from a clock.

1. The loss before all, and four steps of each method, to see what they cost and that they fit in memory.
2. A short training at every learning rate, measured on a part of the blocks.
3. A whole one at the better half of each method's rates.
4. Further seeds of what is near the best, for the intervals.

How long a training is follows from the budget and from seconds that are in the results, so that a comparison
that was killed goes on as it would have. Once there is a training of a phase, all others of it are as long,
also with another budget.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heapreplace
from itertools import zip_longest
from statistics import mean
from typing import NamedTuple

from mica.cli.compare import outcomes
from mica.cli.compare.outcomes import Limit, Result
from mica.errors import UsageError

Results = dict[str, Result]  # by `Planned.key`
BASE = "base"
TRIAL, SHORT, WHOLE, SEEDS = 1, 2, 3, 4  # phases
_TRIED = 4  # steps that show what a step costs
_PART = 4  # a short training has this part of the steps of a whole one
LEAST = 32  # steps of a whole training: rather fewer seeds
_BEST = 2  # methods get more than two seeds
_MARGIN = 1.2  # of a budget that is named after four steps: they vary by a tenth from one start to the next
_FULLEST = 0.93  # of the budget is planned; further seeds may fill it


class Planned(NamedTuple):
    """A training to do, or for `BASE` the measurement of the model before all."""

    phase: int
    method: str
    rate: float = 0.0
    steps: int = 0
    seed: int = 0

    @property
    def key(self) -> str:
        """The name of its result."""
        if self.method == BASE:
            return BASE
        return f"{self.phase}-{self.method}-{self.rate:g}-{self.steps}-{self.seed}"


class Question(NamedTuple):
    """What is to be compared.

    ``rates``: method -> learning rates, ascending. ``budget``: seconds. ``steps``: of a whole training, or
    None. ``longest``: steps that it may have at most, by the length of the text. ``short_blocks``,
    ``whole_blocks``: how many are measured after a short and after a whole training.
    """

    rates: dict[str, list[float]]
    seeds: int
    budget: float
    steps: int | None
    longest: int
    short_blocks: int
    whole_blocks: int


class Plan(NamedTuple):
    """What the budget allows: ``steps`` of a whole training, and how many ``seeds`` of the best ones."""

    steps: int
    seeds: int

    @property
    def short_steps(self) -> int:
        return math.ceil(self.steps / _PART)


class Cost(NamedTuple):
    """Seconds of a method before its first step, of a step, and of the measurement of a block."""

    start: float
    step: float
    block: float

    def seconds(self, steps: int, blocks: int) -> float:
        """Seconds of a training of so many steps, and of the measurement of so many blocks after it."""
        return self.start + steps * self.step + blocks * self.block


class Comparison(NamedTuple):
    """A question and the results that there are, from which follows what is done next."""

    question: Question
    results: Results

    @property
    def base(self) -> Result:
        """What was measured before all trainings."""
        return self.results[BASE]

    def planned(self) -> list[Planned]:
        """All that can be done now, in order: the rest of the phase that is under way. Empty at the end.

        Raises UsageError if the budget is too short for anything, or no method can be trained.
        """
        for phase in (self._trials, self._short, self._whole, self._more_seeds):
            left = [planned for planned in phase() if planned.key not in self.results]
            if left:
                return left
        return []

    def by_method(self, *phases: int) -> dict[str, list[Result]]:
        """method -> its trainings in these phases that came to their end, of those that have any."""
        found = {method: [] for method in self.question.rates}
        for run in self.results.values():
            if run["method"] in found and run["phase"] in phases and run["failed"] is None:
                found[run["method"]].append(run)
        return {method: some for method, some in found.items() if some}

    def costs(self, *phases: int) -> dict[str, Cost]:
        """Of each method in these phases; where they measured nothing, a block is as the base's."""
        found = {}
        for method, some in self.by_method(*phases).items():
            blocks = [run["block_seconds"] for run in some if run["points"]]
            found[method] = Cost(
                start=mean(run["start_seconds"] for run in some),
                step=mean(run["step_seconds"] for run in some),
                block=mean(blocks or [self.base["block_seconds"]]),
            )
        return found

    def spent(self, *phases: int) -> float:
        """Seconds on the clock until the last training of these phases had ended; without any, of all."""
        runs = self.results.values()
        return max((run["ended"] for run in runs if not phases or run["phase"] in phases), default=0.0)

    def _trials(self) -> list[Planned]:
        lowest = [Planned(TRIAL, method, rates[0], _TRIED) for method, rates in self.question.rates.items()]
        return [Planned(TRIAL, BASE), *lowest]

    def _short(self) -> list[Planned]:
        steps = self._steps_of(SHORT) or self.allowed().short_steps
        rates = {method: self.question.rates[method] for method in self.by_method(TRIAL)}
        return _at_rates(SHORT, rates, steps)

    def _steps_of(self, phase: int) -> int | None:
        """How long the trainings of a phase are, if there is one."""
        return next((run["steps"] for run in self.results.values() if run["phase"] == phase), None)

    def allowed(self) -> Plan:
        """What the budget allows, by the first steps of each method: rather fewer seeds than fewer steps.

        Raises UsageError if that is nothing, unless trainings were done with another budget.
        """
        question = self.question
        costs = self.costs(TRIAL)
        if not costs:
            failed = [run["failed"] for run in self.results.values() if run["failed"]]
            raise UsageError(f"no method could be trained: {failed[0]}")
        left = _FULLEST * question.budget - self.spent(TRIAL)
        least = question.steps or min(LEAST, question.longest)
        longest = question.steps or question.longest

        def seconds(seeds: int, steps: int) -> float:
            return self._seconds(costs, Plan(steps, seeds))

        for seeds in range(question.seeds, 0, -1):
            if seconds(seeds, least) <= left:
                return Plan(_most(partial(seconds, seeds), least, longest, left), seeds)

        if self._steps_of(SHORT):
            return Plan(least, 1)
        minutes = math.ceil(_MARGIN * (self.spent(TRIAL) + seconds(1, least)) / _FULLEST / 60)
        what = f"too short here: --budget {minutes} should do, or fewer --methods, --rates or --steps"
        raise UsageError(f"--budget {question.budget / 60:g}: {what}")

    def _seconds(self, costs: dict[str, Cost], plan: Plan) -> float:
        """Seconds on the clock of all trainings of ``plan``."""
        short = []
        halves = {}
        for method, cost in costs.items():
            number = len(self.question.rates[method])
            short += [cost.seconds(plan.short_steps, self.question.short_blocks)] * number
            halves[method] = math.ceil(number / 2)
        return self._clock(short) + self._seconds_of_whole(costs, halves, plan)

    def _seconds_of_whole(self, costs: dict[str, Cost], rates: dict[str, int], plan: Plan) -> float:
        """The same of whole trainings at so many ``rates`` of each method, and of the seeds to be wanted."""
        each = {method: costs[method].seconds(plan.steps, self.question.whole_blocks) for method in rates}
        whole = []
        for method, seconds in each.items():
            whole += [seconds] * rates[method]
        seeds = []
        if plan.seeds > 1:
            seeds += each.values()
            seeds += [mean(each.values())] * min(len(each), _BEST) * (plan.seeds - 2)
        return self._clock(whole) + self._clock(seeds)

    def _clock(self, seconds: Iterable[float]) -> float:
        """When the last of some trainings ends, if they begin in this order, as many at once as can."""
        ends = [0.0] * self.base["jobs"]
        for needed in seconds:
            heapreplace(ends, ends[0] + needed)
        return max(ends)

    def _whole(self) -> list[Planned]:
        """The better half of each method's rates: best at equal forgetting, and best at any."""
        short = self.by_method(SHORT)
        limit = outcomes.common_limit(self.base, short)
        rates = {method: _better_half(self.base, found, limit) for method, found in short.items()}
        if not rates:
            return []
        return _at_rates(WHOLE, rates, self._whole_steps(rates))

    def _whole_steps(self, rates: dict[str, list[float]]) -> int:
        """Steps of whole trainings by the time that is left now; at least as many as short ones have."""
        known = self.question.steps or self._steps_of(WHOLE)
        if known is not None:
            return known
        plan = self.allowed()
        costs = self.costs(SHORT)
        numbers = {method: len(of_method) for method, of_method in rates.items()}
        left = _FULLEST * self.question.budget - self.spent(TRIAL, SHORT)

        def seconds(steps: int) -> float:
            return self._seconds_of_whole(costs, numbers, plan._replace(steps=steps))

        return _most(seconds, plan.short_steps, self.question.longest, left)

    def wanted_seeds(self) -> list[Planned]:
        """Further seeds of each method's best training, in the order in which they are worth most.

        A second seed of each shows what seeds change; then follow more of the best two methods.
        """
        found = self.by_method(WHOLE)
        choices = outcomes.choose_each(self.base, found, outcomes.common_limit(self.base, found))
        order = sorted(choices, key=lambda method: -choices[method].first.validation)
        wanted = []
        for seed in range(1, self.question.seeds):
            for method in order:
                wanted.append(Planned(SEEDS, method, choices[method].rate, choices[method].steps, seed))
            order = order[:_BEST]
        return wanted

    def _more_seeds(self) -> list[Planned]:
        """Of the `wanted_seeds` those for which there is time."""
        left = self.question.budget - self.spent(TRIAL, SHORT, WHOLE)
        costs = self.costs(WHOLE)
        found = []
        seconds = []
        for planned in self.wanted_seeds():
            seconds.append(costs[planned.method].seconds(planned.steps, self.question.whole_blocks))
            if self._clock(seconds) > left:
                break
            found.append(planned)
        return found


def _at_rates(phase: int, rates: dict[str, list[float]], steps: int) -> list[Planned]:
    """A training at each of the rates: the first rate of each method, then the second one, ..."""
    turns = zip_longest(*rates.values())
    pairs = [pair for turn in turns for pair in zip(rates, turn, strict=True)]
    return [Planned(phase, method, rate, steps) for method, rate in pairs if rate is not None]


def _most(seconds: Callable[[int], float], least: int, longest: int, left: float) -> int:
    """The most steps up to ``longest`` that take no more than the seconds ``left``; or ``least``."""
    more = range(least + 1, longest + 1)
    return least + bisect_right(more, left, key=seconds)


def _better_half(base: Result, short: list[Result], limit: Limit) -> list[float]:
    """The rates of ``short`` trainings, of one method, that are worth whole ones; the best first."""

    def ordered(limit: Limit) -> list[float]:
        by_score = sorted(short, key=lambda run: -outcomes.outcome(base, run).within(limit).validation)
        return [run["rate"] for run in by_score]

    order = dict.fromkeys([ordered(limit)[0], *ordered(outcomes.ANY)])
    return [*order][: math.ceil(len(short) / 2)]
