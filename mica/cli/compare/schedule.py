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
from collections.abc import Callable, Iterable, Sized
from functools import partial
from heapq import heapreplace
from operator import itemgetter
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
LEAST = 32  # steps of a whole training: rather fewer rates and seeds
_FULLEST = 0.93  # of the budget is planned
_LATEST = 1.0  # and the last trainings may end so much later


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
    """What the budget allows: ``steps`` of a whole training, learning ``rates`` of a method, ``seeds``."""

    steps: int
    rates: int
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


def planned(question: Question, results: Results) -> list[Planned]:
    """All that can be done now, in order: the rest of the phase that is under way. Empty at the end.

    Raises UsageError if the budget is too short for anything, or no method can be trained.
    """
    for phase in (_trials, _short, _whole, _more_seeds):
        left = [one for one in phase(question, results) if one.key not in results]
        if left:
            return left
    return []


def runs(results: Results, method: str, *phases: int) -> list[Result]:
    """The trainings of ``method`` in these phases that came to their end."""
    found = [one for one in results.values() if one["method"] == method and one["phase"] in phases]
    return [one for one in found if one["failed"] is None]


def by_method(question: Question, results: Results, *phases: int) -> dict[str, list[Result]]:
    """method -> its `runs`, of those that have any."""
    found = {method: runs(results, method, *phases) for method in question.rates}
    return {method: some for method, some in found.items() if some}


def _trials(question: Question, results: Results) -> list[Planned]:
    lowest = [Planned(TRIAL, method, rates[0], _TRIED) for method, rates in question.rates.items()]
    return [Planned(TRIAL, BASE), *lowest]


def _short(question: Question, results: Results) -> list[Planned]:
    plan = allowed(question, results)
    working = by_method(question, results, TRIAL)
    rates = {method: inner(question.rates[method], plan.rates) for method in working}
    return _at_rates(SHORT, rates, _steps_of(results, SHORT) or plan.short_steps)


def _steps_of(results: Results, phase: int) -> int | None:
    """How long the trainings of a phase are, if there is one."""
    return next((one["steps"] for one in results.values() if one["phase"] == phase), None)


def inner(rates: list[float], number: int) -> list[float]:
    """``number`` of the rates, from the middle."""
    skipped = max(0, len(rates) - number) // 2
    return rates[skipped : skipped + number]


def _at_rates(phase: int, rates: dict[str, list[float]], steps: int) -> list[Planned]:
    """A training at each of the rates: the first rate of each method, then the second one, ..."""
    turns = []
    for method, of_method in rates.items():
        turns += enumerate(Planned(phase, method, rate, steps) for rate in of_method)
    return [one for _, one in sorted(turns, key=itemgetter(0))]


def allowed(question: Question, results: Results) -> Plan:
    """What the budget allows, by the first steps of each method.

    Raises UsageError if that is nothing, unless trainings were done with another budget.
    """
    working = by_method(question, results, TRIAL)
    if not working:
        failed = [one["failed"] for one in results.values() if one["failed"]]
        raise UsageError(f"no method could be trained: {failed[0]}")
    most = max(len(question.rates[method]) for method in working)
    plans = [Plan(0, most, seeds) for seeds in range(question.seeds, 1, -1)]
    plans += [Plan(0, min(most, rates), min(2, question.seeds)) for rates in (most, 3, 2)]
    plans.append(Plan(0, min(most, 2), 1))
    costs = {method: cost_of(results, method, TRIAL) for method in working}
    left = _FULLEST * question.budget - spent(results, TRIAL)
    jobs = results[BASE]["jobs"]
    least = question.steps or min(LEAST, question.longest)
    longest = question.steps or question.longest

    def seconds(plan: Plan, steps: int) -> float:
        return _seconds(question, costs, plan._replace(steps=steps), jobs)

    for plan in plans:
        if seconds(plan, least) <= left:
            return plan._replace(steps=_most(partial(seconds, plan), least, longest, left))

    if _steps_of(results, SHORT):
        return plans[-1]._replace(steps=least)
    needed = spent(results, TRIAL) + seconds(plans[-1], least)
    minutes = math.ceil(needed / _FULLEST / 60)
    what = f"at least {minutes} minutes are needed here, or fewer --methods"
    raise UsageError(f"--budget {question.budget / 60:g}: {what}")


def _most(seconds: Callable[[int], float], least: int, longest: int, left: float) -> int:
    """The most steps up to ``longest`` that take no more than the seconds ``left``; or ``least``."""
    more = range(least + 1, longest + 1)
    return least + bisect_right(more, left, key=seconds)


def _seconds(question: Question, costs: dict[str, Cost], plan: Plan, jobs: int) -> float:
    """Seconds on the clock of all trainings of ``plan``."""
    short = []
    halves = {}
    for method, cost in costs.items():
        number = min(plan.rates, len(question.rates[method]))
        short += [cost.seconds(plan.short_steps, question.short_blocks)] * number
        halves[method] = math.ceil(number / 2)
    return _clock(short, jobs) + _seconds_of_whole(question, costs, halves, plan, jobs)


def _seconds_of_whole(
    question: Question, costs: dict[str, Cost], rates: dict[str, int], plan: Plan, jobs: int
) -> float:
    """The same of whole trainings at so many ``rates`` of each method, and of the seeds to be wanted."""
    each = {method: cost.seconds(plan.steps, question.whole_blocks) for method, cost in costs.items()}
    whole = []
    for method, seconds in each.items():
        whole += [seconds] * rates[method]
    seeds = []
    if plan.seeds > 1:
        seeds += each.values()
        seeds += [mean(each.values())] * _number_of_better(costs) * (plan.seeds - 2)
    return _clock(whole, jobs) + _clock(seeds, jobs)


def _number_of_better(methods: Sized) -> int:
    """How many of some methods get further seeds: a difference between two needs those of both."""
    return min(len(methods), max(2, math.ceil(len(methods) / 2)))


def _clock(seconds: Iterable[float], jobs: int) -> float:
    """When the last of some trainings ends, if ``jobs`` of them run at once and begin in this order."""
    ends = [0.0] * jobs
    for one in seconds:
        heapreplace(ends, ends[0] + one)
    return max(ends)


def cost_of(results: Results, method: str, *phases: int) -> Cost:
    """By trainings of ``method`` in these phases; where they measured nothing, a block is as the base's."""
    found = runs(results, method, *phases)
    blocks = [one["block_seconds"] for one in found if one["points"]]
    return Cost(
        start=mean(one["start_seconds"] for one in found),
        step=mean(one["step_seconds"] for one in found),
        block=mean(blocks or [results[BASE]["block_seconds"]]),
    )


def spent(results: Results, *phases: int) -> float:
    """Seconds on the clock until the last training had ended: of these phases, by default of all."""
    return max(one["ended"] for one in results.values() if not phases or one["phase"] in phases)


def _whole(question: Question, results: Results) -> list[Planned]:
    """The better half of each method's rates: best at equal forgetting, and best at any."""
    short = by_method(question, results, SHORT)
    base = results[BASE]
    limit = outcomes.common_limit(base, short)
    rates = {method: _better_half(base, found, limit) for method, found in short.items()}
    if not rates:
        return []
    return _at_rates(WHOLE, rates, _whole_steps(question, results, rates))


def _better_half(base: Result, short: list[Result], limit: Limit) -> list[float]:
    """The rates of ``short`` trainings, of one method, that are worth whole ones; the best first."""

    def ordered(limit: Limit) -> list[float]:
        by_score = sorted(short, key=lambda run: -outcomes.outcome(base, run).within(limit).validation)
        return [run["rate"] for run in by_score]

    order = dict.fromkeys([ordered(limit)[0], *ordered(outcomes.ANY)])
    return [*order][: math.ceil(len(short) / 2)]


def _whole_steps(question: Question, results: Results, rates: dict[str, list[float]]) -> int:
    """Steps of whole trainings by the time that is left now; at least as many as short ones have."""
    known = question.steps or _steps_of(results, WHOLE)
    if known is not None:
        return known
    plan = allowed(question, results)
    costs = {method: cost_of(results, method, SHORT) for method in rates}
    numbers = {method: len(of_method) for method, of_method in rates.items()}
    left = _FULLEST * question.budget - spent(results, TRIAL, SHORT)
    jobs = results[BASE]["jobs"]

    def seconds(steps: int) -> float:
        return _seconds_of_whole(question, costs, numbers, plan._replace(steps=steps), jobs)

    return _most(seconds, plan.short_steps, question.longest, left)


def wanted_seeds(question: Question, results: Results) -> list[Planned]:
    """Further seeds of the trainings that are near the best, in the order in which they are worth most.

    These are the trainings that are best at equal forgetting: a second seed of each, which shows what seeds
    change, then more of the better half of the methods, at least of two. Then those that are best at any.
    """
    found = by_method(question, results, WHOLE)
    base = results[BASE]
    wanted = []
    for limit in (outcomes.common_limit(base, found), outcomes.ANY):
        choices = {method: outcomes.choose(base, some, limit) for method, some in found.items()}
        choices = {method: one for method, one in choices.items() if one is not None}
        order = sorted(choices, key=lambda method: -choices[method].first.validation)
        better = order[: _number_of_better(order)]
        for seed in range(1, question.seeds):
            for method in order if seed == 1 else better:
                wanted.append(Planned(SEEDS, method, choices[method].rate, choices[method].steps, seed))
    return [*dict.fromkeys(wanted)]


def _more_seeds(question: Question, results: Results) -> list[Planned]:
    """Of the `wanted_seeds` those for which there is time."""
    left = _LATEST * question.budget - spent(results, TRIAL, SHORT, WHOLE)
    found = []
    seconds = []
    for one in wanted_seeds(question, results):
        seconds.append(cost_of(results, one.method, WHOLE).seconds(one.steps, question.whole_blocks))
        if _clock(seconds, results[BASE]["jobs"]) > left:
            break
        found.append(one)
    return found


def not_done(question: Question, results: Results) -> list[str]:
    """What the budget did not allow, a sentence each; of a comparison that has ended."""
    plan = allowed(question, results)
    lines = []
    for method in by_method(question, results, TRIAL):
        tried = inner(question.rates[method], plan.rates)
        left_out = [f"{rate:g}" for rate in question.rates[method] if rate not in tried]
        if left_out:
            lines.append(f"{method} at learning rate {' and '.join(left_out)}")
    for one in wanted_seeds(question, results):
        if one.key not in results:
            lines.append(f"{one.method} at learning rate {one.rate:g}, seed {one.seed}")
    return lines
