"""What a comparison does with its budget, on a clock of its own."""

import math
import random
import re

import pytest

from mica.cli.compare.schedule import BASE, LEAST, RATES, SEEDS, TRIAL
from mica.errors import UsageError
from tests.mica.cli.compare.comparisons import NAMES, World, comparison, simulate


def costs(seed, spread=0.15):
    """Seconds of start, step and block: a scale, methods that differ by up to 2, and noise."""
    generator = random.Random(seed)
    scale = math.exp(generator.uniform(math.log(0.2), math.log(3)))
    of_method = {name: generator.uniform(1, 2) for name in (*NAMES, BASE)}

    def seconds(planned):
        noise = random.Random(f"{seed}{planned.key}").uniform(1 - spread, 1 + spread)
        return 2.0, scale * of_method[planned.method] * noise, 0.12 * scale * noise

    return seconds


def column(results, phase, name, method=None):
    """A value of the trainings in a phase, of one method or of all."""
    return [
        run[name] for run in results.values() if run["phase"] == phase and method in (None, run["method"])
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_budget_is_held(seed):
    """Not above 1.1 of it, and not below 0.75 unless all that was wanted has run."""
    asked = comparison(budget=3600.0)
    simulate(asked, costs(seed))
    assert asked.spent() <= 1.1 * 3600
    assert asked.spent() >= 0.75 * 3600 or not asked.left()
    assert len(column(asked.results, RATES, "rate")) == 12


def test_all_rates_are_tried_and_each_method_has_as_many_seeds_at_its_best():
    results = simulate(comparison(longest=40), costs(1))
    for name in NAMES:
        assert sorted(column(results, RATES, "rate", name)) == [1e-3, 2e-3, 4e-3, 8e-3]
        assert column(results, SEEDS, "seed", name) == [1, 2]
    assert {*column(results, SEEDS, "rate")} == {2e-3}
    assert {*column(results, RATES, "steps"), *column(results, SEEDS, "steps")} == {40}
    order = column(results, RATES, "rate")
    assert order == sorted(order)  # so that without time for all no method is short of more than one


def test_what_follows_depends_on_results_alone():
    """Whatever is missing of a phase is planned again, and nothing else: as after kill -9."""
    results = simulate(comparison())
    for number in (TRIAL, RATES, SEEDS):
        earlier = {key: run for key, run in results.items() if run["phase"] < number}
        of_phase = {key: run for key, run in results.items() if run["phase"] == number}
        for draw in range(5):
            done = random.Random(draw).sample(sorted(of_phase), draw * len(of_phase) // 5)
            left = comparison(earlier | {key: of_phase[key] for key in done}).left()
            assert {planned.key for planned in left} == {*of_phase} - {*done}
    assert not comparison(results).left()


def test_a_small_budget_has_fewer_seeds():
    seeds = []
    for budget in (900.0, 700.0, 550.0):
        asked = comparison(budget=budget)
        simulate(asked)
        seeds.append(len(column(asked.results, SEEDS, "seed")))
        assert asked.steps() >= LEAST
    assert seeds[0] == 6
    assert seeds[2] < 2 < seeds[1] < 6


def test_too_small_a_budget_names_one_that_suffices_for_what_was_measured():
    """Nothing of that is measured again."""
    for more in ({}, {"length": 500}):
        asked = comparison(budget=120.0, **more)
        with pytest.raises(UsageError, match=r"^--budget 2: too short for \d+ steps at each ") as raised:
            simulate(asked)
        kept = dict(asked.results)
        assert len(kept) == 4
        minutes = int(re.search(r"--resume --budget (\d+) goes on", str(raised.value))[1])
        enough = asked._replace(budget=60.0 * minutes)
        assert kept.items() <= simulate(enough).items()
        assert len(column(enough.results, RATES, "rate")) == 12
        with pytest.raises(UsageError, match="too short for"):
            comparison(kept, budget=60.0 * 0.7 * minutes, **more).left()


def test_without_time_for_all_rates_a_budget_is_named_that_suffices():
    """The first steps were quick; then the machine was busy."""

    def seconds(planned):
        return 2.0, 1.0 if planned.phase == TRIAL else 3.0, 0.1

    asked = comparison(seeds=1, budget=1000.0)
    simulate(asked, seconds)
    assert asked.spent() <= 1000
    left = asked.left()
    assert {planned.phase for planned in left} == {RATES}
    more = asked._replace(budget=60.0 * asked.minutes_for(left))
    simulate(more, seconds)
    assert not more.left()


def test_a_training_that_was_held_up_says_nothing_of_the_next_ones():
    asked = comparison(simulate(comparison()))
    *_, planned = [planned for planned in [*asked._at_rates()] if planned.method == "mica"]
    before = asked.seconds(planned)
    asked.results[planned.key]["seconds"] += 3600
    assert asked.seconds(planned) == pytest.approx(before, rel=0.01)


def test_what_fails_is_not_gone_on_with():
    """A method that does not fit in memory is left out, and so are rates that diverge."""
    results = simulate(comparison(), costs(1), World(fails=("1-full", "2-mica-0.002")))
    assert {*column(results, RATES, "method")} == {"mica", "lora"}
    assert {*column(results, SEEDS, "rate", "mica")} <= {1e-3, 4e-3}
    nothing = comparison()
    simulate(nothing, world=World(fails=("1-",)))
    assert not nothing.left()
    assert not nothing.whole()


def test_another_budget_adds_to_what_is_there_and_refuses_nothing():
    """Trainings of other lengths could not be compared with it."""
    before = dict(simulate(comparison(budget=1200.0), costs(1)))
    more = simulate(comparison(dict(before), budget=3600.0, seeds=6), costs(1))
    assert before.items() <= more.items()
    assert len(column(more, SEEDS, "seed")) > len(column(before, SEEDS, "seed"))
    assert len({*column(more, RATES, "steps"), *column(more, SEEDS, "steps")}) == 1
    assert comparison(before, budget=60.0, seeds=7).next() is None
