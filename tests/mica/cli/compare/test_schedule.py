"""What a comparison does with its budget, on a clock of its own."""

import math
import random

import pytest

from mica.cli.compare.schedule import BASE, SEEDS, SHORT, TRIAL, WHOLE, Comparison, Planned
from mica.errors import UsageError
from tests.mica.cli.compare.comparisons import NAMES, World, base, proportional, question, simulate


def learns(method, rate, step):
    """The best rate is the second; LoRA and MiCA are ahead."""
    peak = math.exp(-abs(math.log2(rate / 2e-3)))
    return {"mica": 0.5, "lora": 0.55}.get(method, 0.3) * peak * (1 - math.exp(-step / 30))


WORLD = World(learns, proportional, 0.02, 0.01)


def costs(seed, spread=0.15):
    """Seconds of start, step and block: a scale, methods that differ by up to 2, and noise."""
    generator = random.Random(seed)
    scale = math.exp(generator.uniform(math.log(0.2), math.log(3)))
    of_method = {name: generator.uniform(1, 2) for name in ("mica", "lora", "random", "full", BASE)}

    def seconds(one):
        noise = random.Random(f"{seed}{one.key}").uniform(1 - spread, 1 + spread)
        step = scale * of_method[one.method] * noise
        return 2.0, step, 0.12 * scale * noise

    return seconds


def phase(results, number):
    return [one for one in results.values() if one["phase"] == number]


@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.parametrize("seed", range(12))
def test_the_budget_is_held(seed, jobs):
    """Not above 1.1 of it, and not below 0.85 unless all seeds that were wanted have run."""
    results = simulate(question(), WORLD, costs(seed), jobs)
    end = max(one["ended"] for one in results.values())
    assert end <= 1.1 * 1800
    is_full = not Comparison(question(), results).not_done()
    assert end >= 0.85 * 1800 or is_full


def test_rates_are_halved_and_seeds_are_of_what_is_near_the_best():
    results = simulate(question(), WORLD, costs(1))
    assert len(phase(results, SHORT)) == 16
    for name in NAMES:
        rates = [one["rate"] for one in phase(results, WHOLE) if one["method"] == name]
        assert len(rates) == 2
        assert 2e-3 in rates
    seeds = {name: [one["seed"] for one in phase(results, SEEDS) if one["method"] == name] for name in NAMES}
    assert seeds == {"mica": [1, 2], "lora": [1, 2], "random": [1], "full": [1]}
    assert {one["rate"] for one in phase(results, SEEDS)} == {2e-3}
    short, whole = phase(results, SHORT)[0], phase(results, WHOLE)[0]
    assert short["steps"] < whole["steps"] / 2


def test_the_rate_that_is_best_at_equal_forgetting_is_gone_on_with():
    """High rates learn most, and forget far more: the lowest is best where little may be forgotten."""

    def forgets(method, rate, step):
        return 0.001 * step * ((rate / 1e-3) ** 2 if method == "mica" else 1)

    world = World(lambda method, rate, step: 0.01 * step * (rate / 1e-3) ** 0.5, forgets)
    results = simulate(question(), world, costs(1))
    rates = [one["rate"] for one in phase(results, WHOLE) if one["method"] == "mica"]
    assert sorted(rates) == [1e-3, 8e-3]


def test_whole_trainings_are_as_long_as_short_ones_have_shown_to_fit():
    """The first steps were quick; then the machine was busy."""
    quick = costs(3)

    def seconds(one):
        return tuple(value * (1 if one.phase == TRIAL else 1.5) for value in quick(one))

    results = simulate(question(), WORLD, seconds)
    planned = Comparison(question(), results).allowed().steps
    assert {one["steps"] < 0.8 * planned for one in phase(results, WHOLE)} == {True}
    assert max(one["ended"] for one in results.values()) <= 1.1 * 1800


def test_what_follows_depends_on_results_alone():
    """Whatever is missing of a phase is planned again, and nothing else: as after kill -9."""
    asked = question()
    results = simulate(asked, WORLD, costs(2))
    for number in (TRIAL, SHORT, WHOLE, SEEDS):
        earlier = {key: one for key, one in results.items() if one["phase"] < number}
        of_phase = {key: one for key, one in results.items() if one["phase"] == number}
        assert {one.key for one in Comparison(asked, earlier).planned()} == set(of_phase)
        for draw in range(5):
            done = random.Random(draw).sample(sorted(of_phase), len(of_phase) // 2)
            left = Comparison(asked, earlier | {key: of_phase[key] for key in done}).planned()
            assert {one.key for one in left} == set(of_phase) - set(done)
    assert not Comparison(asked, results).planned()


def test_keys_name_one_training_each():
    results = simulate(question(), WORLD, costs(1))
    planned = [Planned(*(one[name] for name in Planned._fields)) for one in results.values()]
    assert [one.key for one in planned] == [*results]
    assert len({one.key for one in planned}) == len(planned)


def test_given_steps_are_kept():
    results = simulate(question(steps=40), WORLD, costs(4))
    assert {one["steps"] for one in phase(results, SHORT)} == {10}
    assert {one["steps"] for one in phase(results, WHOLE)} == {40}


def test_a_training_is_not_longer_than_the_text_bears():
    """Nor is the time that is left spent on seeds of the worse."""
    results = simulate(question(longest=20), WORLD, costs(4))
    assert {one["steps"] for one in phase(results, WHOLE)} == {20}
    assert Comparison(question(longest=20), results).not_done() == []
    seeds = {name: [one["seed"] for one in phase(results, SEEDS) if one["method"] == name] for name in NAMES}
    assert seeds == {"mica": [1, 2], "lora": [1, 2], "random": [1], "full": [1]}


def test_trainings_run_on_all_gpus_at_once():
    comparison = Comparison(question(), {BASE: base(jobs=2)})
    assert comparison._clock([3.0, 1.0, 1.0, 2.0]) == 4.0


def test_a_small_budget_has_fewer_seeds_then_fewer_rates():
    shares = [1.0, 0.6, 0.4, 0.3, 0.25, 0.2]
    plans = []
    for share in shares:
        asked = question(budget=1800 * share)
        results = simulate(asked, WORLD, lambda one: (2.0, 1.0, 0.2), stop_after=5)
        plans.append(Comparison(asked, results).allowed())
    assert plans[0].seeds == 3
    assert [plan.seeds for plan in plans] == sorted((plan.seeds for plan in plans), reverse=True)
    assert [plan.rates for plan in plans] == sorted((plan.rates for plan in plans), reverse=True)
    assert plans[-1].rates < 4
    assert all(plan.steps >= 32 for plan in plans)


def test_too_small_a_budget_is_refused_with_one_that_suffices():
    asked = question(budget=120.0)
    with pytest.raises(UsageError, match=r"^--budget 2: at least (\d+) minutes are needed here") as raised:
        simulate(asked, WORLD, lambda one: (2.0, 1.0, 0.2))
    minutes = int(str(raised.value).split("at least ")[1].split()[0])
    results = simulate(question(budget=60.0 * minutes), WORLD, lambda one: (2.0, 1.0, 0.2))
    assert phase(results, WHOLE)
    with pytest.raises(UsageError, match="minutes are needed"):
        simulate(question(budget=60.0 * (minutes - 1)), WORLD, lambda one: (2.0, 1.0, 0.2))


def failing(*keys):
    """The world, where trainings whose key begins so fail."""

    class Failing(World):
        def result(self, one, **more):
            result = super().result(one, **more)
            if one.key.startswith(keys):
                result |= {"points": [], "failed": "out of memory"}
            return result

    return Failing(learns, proportional, 0.02, 0.01)


def test_a_method_that_does_not_fit_is_left_out():
    results = simulate(question(), failing("1-full"), costs(1))
    assert {one["method"] for one in phase(results, SHORT)} == {"mica", "lora", "random"}
    with pytest.raises(UsageError, match=r"^no method could be trained: out of memory$"):
        simulate(question(), failing("1-"), costs(1))


def test_rates_that_diverged_are_not_gone_on_with():
    results = simulate(question(), failing("2-mica-0.002", "2-full"), costs(1))
    assert 2e-3 not in [one["rate"] for one in phase(results, WHOLE) if one["method"] == "mica"]
    assert "full" not in {one["method"] for one in phase(results, WHOLE)}
    results = simulate(question(), failing("2-"), costs(1))
    assert not phase(results, WHOLE)


def test_what_was_not_done_is_listed():
    assert (
        Comparison(question(), simulate(question(), WORLD, lambda one: (1.0, 0.01, 0.001))).not_done() == []
    )
    asked = question(budget=330.0)
    results = simulate(asked, WORLD, lambda one: (2.0, 1.0, 0.2))
    lines = Comparison(asked, results).not_done()
    tried = {one["rate"] for one in phase(results, SHORT) if one["method"] == "mica"}
    left_out = [f"{rate:g}" for rate in (1e-3, 2e-3, 4e-3, 8e-3) if rate not in tried]
    assert left_out
    assert f"mica at learning rate {' and '.join(left_out)}" in lines
    wanted = {one.key for one in Comparison(asked, results).wanted_seeds()}
    assert sum("seed" in line for line in lines) == len(wanted - set(results))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_two_methods_get_as_many_seeds_as_were_asked_for(seeds):
    """A difference needs the seeds of both."""
    results = simulate(question(names=("mica", "lora"), seeds=seeds), WORLD, lambda one: (2.0, 0.5, 0.1))
    for name in ("mica", "lora"):
        assert sorted(one["seed"] for one in phase(results, SEEDS) if one["method"] == name) == [
            *range(1, seeds)
        ]


def test_a_larger_budget_adds_to_what_is_there():
    """Trainings of other lengths could not be compared with it."""
    results = simulate(question(budget=600.0), WORLD, costs(1))
    before = dict(results)
    steps = {one["steps"] for one in phase(results, WHOLE)}
    more = simulate(question(budget=1800.0, seeds=4), WORLD, costs(1), results=results)
    assert before.items() <= more.items()
    assert len(phase(more, SEEDS)) > sum(one["phase"] == SEEDS for one in before.values())
    assert {one["steps"] for one in more.values() if one["phase"] >= WHOLE} == steps
    assert len({one["steps"] for one in phase(more, SHORT)}) == 1


def test_a_smaller_budget_is_not_refused_once_there_are_trainings():
    results = simulate(question(), WORLD, costs(1))
    assert Comparison(question(budget=60.0), results).planned() == []
    assert Comparison(question(budget=60.0), results).not_done()


def test_steps_that_do_not_fit_into_the_budget_are_refused():
    with pytest.raises(UsageError, match=r"^--budget 30: at least \d+ minutes are needed here"):
        simulate(question(steps=5000), WORLD, costs(1))


def test_seeds_that_nobody_has_time_for_are_not_begun():
    asked = question(seeds=50)
    results = simulate(asked, WORLD, costs(1))
    assert max(one["ended"] for one in results.values()) <= 1.1 * 1800
    assert any("seed 49" in line for line in Comparison(asked, results).not_done())
