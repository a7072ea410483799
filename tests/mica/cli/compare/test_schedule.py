"""What a comparison does with its budget, on a clock of its own."""

import math
import random
import re

import pytest

from mica.cli.compare.schedule import BASE, SEEDS, SHORT, TRIAL, WHOLE, Comparison
from mica.errors import UsageError
from tests.mica.cli.compare.comparisons import NAMES, World, proportional, question, simulate


def learns(method, rate, step):
    """The best rate is the second; LoRA and MiCA are ahead."""
    peak = math.exp(-abs(math.log2(rate / 2e-3)))
    return {"mica": 0.5, "lora": 0.55}.get(method, 0.3) * peak * (1 - math.exp(-step / 30))


def world(*fails):
    return World(learns, proportional, 0.02, 0.01, fails=fails)


def costs(seed, spread=0.15):
    """Seconds of start, step and block: a scale, methods that differ by up to 2, and noise."""
    generator = random.Random(seed)
    scale = math.exp(generator.uniform(math.log(0.2), math.log(3)))
    of_method = {name: generator.uniform(1, 2) for name in (*NAMES, BASE)}

    def seconds(planned):
        noise = random.Random(f"{seed}{planned.key}").uniform(1 - spread, 1 + spread)
        return 2.0, scale * of_method[planned.method] * noise, 0.12 * scale * noise

    return seconds


def steady(planned):
    return 2.0, 1.0, 0.2


def column(results, phase, name, method=None):
    """A value of the trainings in a phase, of one method or of all."""
    return [
        run[name] for run in results.values() if run["phase"] == phase and method in (None, run["method"])
    ]


def not_done(asked, results):
    """Seeds that were wanted, and for which there was no time."""
    wanted = Comparison(asked, results).wanted_seeds()
    return [planned for planned in wanted if planned.key not in results]


def end(results):
    return max(run["ended"] for run in results.values())


@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.parametrize("seed", range(12))
def test_the_budget_is_held(seed, jobs):
    """Not above 1.1 of it, and not below 0.85 unless all seeds that were wanted have run."""
    asked = question(budget=3600.0)
    results = simulate(asked, world(), costs(seed), jobs)
    assert end(results) <= 1.1 * 3600
    assert end(results) >= 0.85 * 3600 or not not_done(asked, results)


@pytest.mark.parametrize("longest", [10_000, 20])  # nor is the time that is left spent on seeds of the worse
def test_rates_are_halved_and_seeds_are_of_what_is_near_the_best(longest):
    results = simulate(question(longest=longest), world(), costs(1))
    assert len(column(results, SHORT, "rate")) == 16
    for name in NAMES:
        rates = column(results, WHOLE, "rate", name)
        assert len(rates) == 2
        assert 2e-3 in rates
    seeds = {name: column(results, SEEDS, "seed", name) for name in NAMES}
    assert seeds == {"mica": [1, 2], "lora": [1, 2], "random": [1], "full": [1]}
    assert {*column(results, SEEDS, "rate")} == {2e-3}
    (short,), (steps,) = ({*column(results, phase, "steps")} for phase in (SHORT, WHOLE))
    assert short < steps / 2
    assert steps <= longest


def test_the_rate_that_is_best_at_equal_forgetting_is_gone_on_with():
    """High rates learn most, and forget far more: the lowest is best where little may be forgotten."""

    def forgets(method, rate, step):
        return 0.001 * step * ((rate / 1e-3) ** 2 if method == "mica" else 1)

    steep = World(lambda method, rate, step: 0.01 * step * (rate / 1e-3) ** 0.5, forgets)
    results = simulate(question(), steep, costs(1))
    assert sorted(column(results, WHOLE, "rate", "mica")) == [1e-3, 8e-3]


def test_whole_trainings_are_as_long_as_short_ones_have_shown_to_fit():
    """The first steps were quick; then the machine was busy."""
    quick = costs(3)

    def seconds(planned):
        return tuple(value * (1 if planned.phase == TRIAL else 1.5) for value in quick(planned))

    results = simulate(question(), world(), seconds)
    planned = Comparison(question(), results).allowed().steps
    assert max(column(results, WHOLE, "steps")) < 0.8 * planned
    assert end(results) <= 1.1 * 1800


def test_what_follows_depends_on_results_alone():
    """Whatever is missing of a phase is planned again, and nothing else: as after kill -9."""
    asked = question()
    results = simulate(asked, world(), costs(2))
    for number in (TRIAL, SHORT, WHOLE, SEEDS):
        earlier = {key: run for key, run in results.items() if run["phase"] < number}
        of_phase = {key: run for key, run in results.items() if run["phase"] == number}
        for draw in range(5):
            done = random.Random(draw).sample(sorted(of_phase), draw * len(of_phase) // 5)
            left = Comparison(asked, earlier | {key: of_phase[key] for key in done}).planned()
            assert {planned.key for planned in left} == {*of_phase} - {*done}
    assert not Comparison(asked, results).planned()


def test_a_small_budget_has_fewer_seeds():
    plans = []
    for budget in (1800.0, 500.0, 460.0, 420.0, 380.0, 340.0):
        asked = question(budget=budget)
        plans.append(Comparison(asked, simulate(asked, world(), steady, stop_after=5)).allowed())
    seeds = [plan.seeds for plan in plans]
    assert seeds == sorted(seeds, reverse=True)
    assert {*seeds} == {1, 2, 3}
    assert all(plan.steps >= 32 for plan in plans)


def test_too_small_a_budget_is_refused_with_one_that_suffices():
    with pytest.raises(UsageError, match=r"^--budget 2: too short here: --budget (\d+) should do") as raised:
        simulate(question(budget=120.0), world(), steady)
    minutes = int(re.search(r"--budget (\d+) should", str(raised.value))[1])
    assert column(simulate(question(budget=60.0 * minutes), world(), steady), WHOLE, "steps")
    for asked in (question(budget=60.0 * 0.7 * minutes), question(steps=5000)):
        with pytest.raises(UsageError, match="too short here"):
            simulate(asked, world(), steady)


def test_what_fails_is_not_gone_on_with():
    """A method that does not fit in memory is left out, and so are rates that diverge."""
    results = simulate(question(), world("1-full", "2-mica-0.002", "2-lora"), costs(1))
    assert {*column(results, SHORT, "method")} == {"mica", "lora", "random"}
    assert {*column(results, WHOLE, "method")} == {"mica", "random"}
    assert 2e-3 not in column(results, WHOLE, "rate", "mica")
    assert not column(simulate(question(), world("2-"), costs(1)), WHOLE, "rate")
    with pytest.raises(UsageError, match=r"^no method could be trained: out of memory$"):
        simulate(question(), world("1-"), costs(1))


def test_seeds_that_nobody_has_time_for_are_not_begun():
    asked = question(seeds=50)
    results = simulate(asked, world(), costs(1))
    assert end(results) <= 1.1 * 1800
    assert len(not_done(asked, results)) == 2 + 2 + 2 * 48 - len(column(results, SEEDS, "seed"))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_two_methods_get_as_many_seeds_as_were_asked_for(seeds):
    """A difference needs the seeds of both."""
    asked = question(names=("mica", "lora"), seeds=seeds, steps=40)
    results = simulate(asked, world(), lambda _: (2.0, 0.5, 0.1))
    assert [{*column(results, phase, "steps")} for phase in (SHORT, WHOLE)] == [{10}, {40}]
    for name in ("mica", "lora"):
        assert sorted(column(results, SEEDS, "seed", name)) == [*range(1, seeds)]


def test_another_budget_adds_to_what_is_there_and_refuses_nothing():
    """Trainings of other lengths could not be compared with it."""
    results = simulate(question(budget=1200.0), world(), costs(1))
    before = dict(results)
    more = simulate(question(budget=2400.0, seeds=6), world(), costs(1), results=results)
    assert before.items() <= more.items()
    assert len(column(more, SEEDS, "seed")) > len(column(before, SEEDS, "seed"))
    assert len({*column(more, WHOLE, "steps"), *column(more, SEEDS, "steps")}) == 1
    assert len({*column(more, SHORT, "steps")}) == 1
    short = {key: run for key, run in results.items() if run["phase"] <= SHORT}
    assert len(Comparison(question(budget=60.0), short).planned()) == 8
    assert not_done(question(budget=60.0, seeds=7), results)
