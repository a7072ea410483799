"""Which trainings a comparison does, in an order that follows from what was measured, never from a clock.

1. Four steps of each method, to see what they cost, and that they fit in memory.
2. A short training at every learning rate.
3. A whole one at the better half of each method's rates.
4. Further seeds of what is near the best, for the intervals.

How long a training is follows from the budget and from seconds that are in the results, so that a comparison
that was killed goes on as it would have.
"""

import math
from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

from mica.cli.compare import curves
from mica.cli.compare.curves import Result
from mica.errors import UsageError

Results = dict[str, Result]  # by `Planned.key`
BASE = "base"
_TRIED = 4  # steps that show what a step costs
_SHORT = 4  # a short training has this part of the steps of a whole one
_PARTS = 3  # of a whole training, see `Planned`
_LEAST = 16  # steps of a whole training, below which it shows nothing
_FULLEST = 0.93  # of the budget is planned: the last trainings do not end together


class Planned(NamedTuple):
    """A training to do, or for `BASE` the measurement of the model before all.

    ``parts``: of equal length, at the end of which it is measured.
    """

    phase: int
    method: str
    rate: float = 0.0
    steps: int = 0
    seed: int = 0
    parts: int = 1

    @property
    def key(self) -> str:
        """The name of its result."""
        if self.method == BASE:
            return BASE
        return f"{self.phase}-{self.method}-{self.rate:g}-{self.steps}-{self.seed}"

    @property
    def stops(self) -> tuple[int, ...]:
        """The steps after which it is measured."""
        if self.phase == 1:
            return ()
        return tuple(math.ceil(self.steps * part / self.parts) for part in range(1, self.parts + 1))


class Question(NamedTuple):
    """What is to be compared.

    ``rates``: method -> learning rates, ascending. ``budget``: seconds. ``steps``: of a whole training, or
    None. ``longest``: steps that it may have at most, by the length of the text.
    """

    rates: dict[str, list[float]]
    seeds: int
    budget: float
    steps: int | None
    longest: int


class _Cost(NamedTuple):
    """Seconds before the first step, of a step, and of a measurement."""

    start: float
    step: float
    measure: float

    def of(self, steps: float, stops: int) -> float:
        return self.start + steps * self.step + stops * self.measure


class Plan(NamedTuple):
    """What the budget allows: ``steps`` of a whole training, learning ``rates`` of a method, ``seeds``."""

    steps: int
    rates: int
    seeds: int


def planned(question: Question, results: Results) -> list[Planned]:
    """All that can be done now, in order: the rest of the phase that is under way. Empty at the end.

    Raises UsageError if the budget is too short for anything.
    """
    for phase in (_trials, _short, _whole, _more_seeds):
        left = [one for one in phase(question, results) if one.key not in results]
        if left:
            return left
    return []


def runs(results: Results, method: str, phases: tuple[int, ...] = (2, 3, 4)) -> list[Result]:
    """The trainings of ``method`` in these phases that came to their end."""
    found = [one for one in results.values() if one["method"] == method and one["phase"] in phases]
    return [one for one in found if one["failed"] is None]


def _trials(question: Question, results: Results) -> list[Planned]:
    lowest = [Planned(1, method, rates[0], _TRIED) for method, rates in question.rates.items()]
    return [Planned(1, BASE), *lowest]


def _short(question: Question, results: Results) -> list[Planned]:
    plan = allowed(question, results)
    steps = math.ceil(plan.steps / _SHORT)
    found = []
    for number in range(plan.rates):
        for method in _working(question, results):
            rates = _inner(question.rates[method], plan.rates)
            if number < len(rates):
                found.append(Planned(2, method, rates[number], steps))
    return found


def _inner(rates: list[float], number: int) -> list[float]:
    """``number`` of the rates, from the middle."""
    skipped = max(0, len(rates) - number) // 2
    return rates[skipped : skipped + number]


def _working(question: Question, results: Results) -> list[str]:
    """The methods whose first steps went well."""
    return [method for method in question.rates if runs(results, method, (1,))]


def allowed(question: Question, results: Results) -> Plan:
    """How much the budget allows, by the first steps of each method.

    Raises UsageError if that is nothing.
    """
    working = _working(question, results)
    if not working:
        failed = [one["failed"] for one in results.values() if one["phase"] == 1 and one["failed"]]
        raise UsageError(f"no method could be trained: {failed[0]}")
    costs = {method: _cost(results, method, (1,)) for method in working}
    most = max(len(question.rates[method]) for method in working)
    plans = [Plan(0, most, question.seeds), Plan(0, most, 2), Plan(0, most, 1), Plan(0, min(most, 2), 1)]
    plans = [plan for plan in plans if plan.seeds <= question.seeds]
    if question.steps is not None:
        return plans[0]._replace(steps=question.steps)

    left = _left(question, results, (1,))
    for plan in plans:
        steps = _solved(lambda steps, plan=plan: _all_seconds(question, costs, plan, steps), left)
        if steps >= _LEAST:
            return plan._replace(steps=min(steps, max(question.longest, _LEAST)))
    jobs = results[BASE]["jobs"]
    needed = question.budget * (1 - _FULLEST) + _spent(results, (1,))
    needed += _all_seconds(question, costs, plans[-1], _LEAST) / jobs
    minutes = math.ceil(needed / _FULLEST / 60)
    raise UsageError(
        f"--budget {question.budget / 60:g}: at least {minutes} minutes are needed here, or fewer --methods"
    )


def _all_seconds(question: Question, costs: dict[str, _Cost], plan: Plan, steps: float) -> float:
    """Seconds that all trainings of ``plan`` take, one after the other."""
    total = 0.0
    for method, cost in costs.items():
        rates = min(plan.rates, len(question.rates[method]))
        total += rates * cost.of(steps / _SHORT, 1) + math.ceil(rates / 2) * cost.of(steps, _PARTS)
    repeated = math.ceil(len(costs) / 2) * (plan.seeds - 1)
    return total + repeated * mean(cost.of(steps, _PARTS) for cost in costs.values())


def _solved(seconds: Callable[[float], float], left: float) -> int:
    """The number of steps, at least 0, with which ``seconds(steps)``, a line, is ``left``."""
    fixed = seconds(0)
    slope = seconds(1) - fixed
    return max(0, math.floor((left - fixed) / slope))


def _cost(results: Results, method: str, phases: tuple[int, ...]) -> _Cost:
    """By the trainings of ``method`` in these phases; by the measurement of the base where they had none."""
    found = runs(results, method, phases)
    measured = [one["measure_seconds"] for one in found if one["points"]] or [
        results[BASE]["measure_seconds"]
    ]
    return _Cost(
        start=mean(one["start_seconds"] for one in found),
        step=mean(one["step_seconds"] for one in found),
        measure=mean(measured or [results[BASE]["measure_seconds"]]),
    )


def _spent(results: Results, phases: tuple[int, ...]) -> float:
    """Seconds on the clock until the last training of these phases had ended."""
    return max(one["ended"] for one in results.values() if one["phase"] in phases)


def _left(question: Question, results: Results, phases: tuple[int, ...]) -> float:
    """Seconds of training that the budget leaves after these phases, of all jobs together."""
    jobs = results[BASE]["jobs"]
    return jobs * max(0.0, _FULLEST * question.budget - _spent(results, phases))


def _whole(question: Question, results: Results) -> list[Planned]:
    """The better half of each method's rates: best at equal forgetting, and best at any."""
    plan = allowed(question, results)
    short = {method: runs(results, method, (2,)) for method in _working(question, results)}
    short = {method: found for method, found in short.items() if found}
    base = results[BASE]
    limit = curves.common_limit(base, short)
    chosen = {method: _better_half(base, found, limit) for method, found in short.items()}
    steps = _whole_steps(question, results, plan, chosen)
    if not steps:
        return []
    most = max((len(rates) for rates in chosen.values()), default=0)
    found = []
    for number in range(most):
        for method, rates in chosen.items():
            if number < len(rates):
                found.append(Planned(3, method, rates[number], steps, 0, _PARTS))
    return found


def _better_half(base: Result, short: list[Result], limit: float) -> list[float]:
    """The rates of ``short`` trainings, of one method, that are worth whole ones; the best first."""

    def scored(limit: float) -> list[float]:
        by_score = sorted(short, key=lambda run: -curves.at(curves.course(base, run), limit).validation)
        return [run["rate"] for run in by_score]

    order = dict.fromkeys([scored(limit)[0], *scored(math.inf)])
    return [*order][: math.ceil(len(short) / 2)]


def _whole_steps(question: Question, results: Results, plan: Plan, chosen: dict[str, list[float]]) -> int:
    """Steps of whole trainings by the time that is left now; 0 if that is too little."""
    if question.steps is not None:
        return question.steps
    costs = {method: _cost(results, method, (2,)) for method in chosen}

    def seconds(steps: float) -> float:
        total = sum(len(chosen[method]) * cost.of(steps, _PARTS) for method, cost in costs.items())
        repeated = math.ceil(len(costs) / 2) * (plan.seeds - 1)
        return total + repeated * mean(cost.of(steps, _PARTS) for cost in costs.values())

    if not costs:
        return 0
    steps = min(_solved(seconds, _left(question, results, (1, 2))), max(question.longest, _LEAST))
    if steps < math.ceil(plan.steps / _SHORT):
        return 0
    return steps


def wanted_seeds(question: Question, results: Results) -> list[Planned]:
    """Further seeds of the trainings that are near the best, in the order in which they are worth most.

    Near: of the better half of the methods at equal forgetting, the trainings that are best there; then those
    that are best at any.
    """
    found = {method: runs(results, method, (2, 3)) for method in question.rates}
    found = {method: some for method, some in found.items() if some}
    base = results[BASE]
    planned_runs = []
    for limit in (curves.common_limit(base, found), math.inf):
        choices = {method: curves.choose(base, some, limit) for method, some in found.items()}
        choices = {method: one for method, one in choices.items() if one is not None}
        order = sorted(choices, key=lambda method: -choices[method].first.validation)
        for seed in range(1, question.seeds):
            for method in order[: math.ceil(len(found) / 2)]:
                one = choices[method]
                planned_runs.append(Planned(4, method, one.rate, one.steps, seed, one.parts))
    return [*dict.fromkeys(planned_runs)]


def _more_seeds(question: Question, results: Results) -> list[Planned]:
    """Of the `wanted_seeds` those for which there is time."""
    jobs = results[BASE]["jobs"]
    left = _left(question, results, (1, 2, 3)) / jobs
    ends = [0.0] * jobs  # on the clock, of what each job does
    found = []
    for one in wanted_seeds(question, results):
        first = ends.index(min(ends))
        ends[first] += _cost(results, one.method, (2, 3)).of(one.steps, one.parts)
        if ends[first] > left:
            break
        found.append(one)
    return found


def expected(question: Question, results: Results) -> float:
    """Seconds that the whole comparison takes, as far as that can be known now."""
    if any(one.phase == 1 for one in planned(question, results)):
        return question.budget
    plan = allowed(question, results)
    costs = {method: _cost(results, method, (1,)) for method in _working(question, results)}
    seconds = _all_seconds(question, costs, plan, plan.steps) / results[BASE]["jobs"]
    return _spent(results, (1,)) + seconds


def not_done(question: Question, results: Results) -> list[str]:
    """What the budget did not allow, a sentence each; of a comparison that has ended."""
    plan = allowed(question, results)
    lines = []
    for method in _working(question, results):
        given = question.rates[method]
        left_out = [rate for rate in given if rate not in _inner(given, plan.rates)]
        if left_out:
            lines.append(f"{method}: learning rates {', '.join(f'{rate:g}' for rate in left_out)}")
    if not any(one["phase"] == 3 for one in results.values()):
        lines.append("whole trainings: only short ones were done")
    missing = [one for one in wanted_seeds(question, results) if one.key not in results]
    for method in dict.fromkeys(one.method for one in missing):
        seeds = [f"{one.seed} at {one.rate:g}" for one in missing if one.method == method]
        lines.append(f"{method}: seed {', '.join(seeds)}")
    return lines
