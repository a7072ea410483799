"""Learned at equal forgetting: by hand, on courses of a few points."""

import math

import pytest

from mica.cli.compare.curves import Point, at, choose, common_limit, course
from mica.cli.compare.schedule import SEEDS, WHOLE, Planned
from tests.support.comparisons import LOSS, SIZES, World, alike, base, proportional, whole


def points(*pairs):
    """(forgotten, learned) after each third of a training."""
    found = [Point(0, 0.0, 0.0, (0.0, 0.0))]
    for number, (forgotten, learned) in enumerate(pairs):
        found.append(Point(10 * (number + 1), forgotten, learned, (learned, 2 * learned)))
    return found


@pytest.mark.parametrize(
    ("pairs", "limit", "step", "learned"),
    [
        (((0.1, 0.2), (0.2, 0.3), (0.4, 0.4)), math.inf, 30, 0.4),
        (((0.1, 0.2), (0.2, 0.3), (0.4, 0.4)), 0.2, 20, 0.3),
        (((0.1, 0.2), (0.2, 0.3), (0.4, 0.44)), 0.3, 30, 0.33),  # three quarters of the last update
        (((0.1, 0.2), (0.2, 0.3), (0.4, 0.4)), 0.05, 10, 0.1),  # half of the first one
        (((0.1, 0.2), (0.2, 0.3), (0.4, 0.4)), 0.0, 0, 0.0),
        (((0.4, 0.2), (0.1, 0.5), (0.2, 0.6)), 0.2, 30, 0.6),  # what it had forgotten before does not count
        (((0.1, 0.2), (0.2, 0.1), (0.3, 0.0)), math.inf, 10, 0.2),  # it gets worse: an earlier stop
        (((0.1, -0.2), (0.2, -0.1), (0.3, -0.3)), math.inf, 0, 0.0),  # rather not at all
        (((-0.1, 0.2), (-0.2, 0.3), (-0.3, 0.4)), 0.0, 30, 0.4),  # nothing forgotten, on the contrary
    ],
)
def test_the_best_point_within_a_limit(pairs, limit, step, learned):
    found = at(points(*pairs), limit)
    assert found.step == step
    assert found.validation == pytest.approx(learned)
    assert found.test == pytest.approx((learned, 2 * learned))
    assert found.forgotten <= limit + 1e-12


def test_an_update_that_forgets_too_much_is_scaled_back():
    assert at(points((0.4, 0.4)), 0.3).share == pytest.approx(0.75)
    assert at(points((0.4, 0.4)), 0.4).share == 1


def test_a_little_more_forgetting_changes_little():
    """Both sides of the limit: no jump."""
    for step in (1e-9, -1e-9):
        found = at(points((0.3, 0.2), (0.25 + step, 0.4)), 0.25)
        assert found.validation == pytest.approx(0.4, abs=1e-7)


def test_a_course_is_the_change_since_the_base():
    before = base(retained=[1.0, 2.0, 3.0, 4.0, 5.0])
    (run,) = whole(World(alike, proportional), "mica", 1)
    for one in run["points"]:
        one["retained"] = [loss + 0.5 for loss in before["retained"]]
        one["retained, the rest"] = [loss + 0.2 for loss in before["retained, the rest"]]
    start, *rest = course(before, run)
    assert start == (0, 0.0, 0.0, (0.0,) * SIZES["test"], 1.0)
    for point, one in zip(rest, run["points"], strict=True):
        assert point.step == one["step"]
        assert point.forgotten == pytest.approx(0.35)  # of all retained blocks
        assert point.test == pytest.approx([LOSS - loss for loss in one["test"]])
        assert point.validation == pytest.approx(LOSS - sum(one["validation"]) / SIZES["validation"])


def test_a_short_training_is_compared_with_the_base_on_the_blocks_it_was_measured_on():
    before = base(retained=[1.0] * 5)  # the other retained blocks have another loss
    (run,) = whole(World(alike, proportional), "mica", 1)
    run["points"] = [{"step": 4, "validation": [2.0] * 6, "retained": [1.25] * 5}]
    assert course(before, run)[1] == (4, 0.25, 1.0, (), 1.0)


def test_the_first_seed_chooses_and_brings_its_others():
    """A later seed, which only the chosen rates have, may be better by chance."""

    def run(rate, seed, learned):
        world = World(lambda *at: learned, proportional)
        return world.result(Planned(WHOLE if seed == 0 else SEEDS, "mica", rate, 60, seed))

    runs = [run(1e-3, 2, 0.9), run(1e-3, 1, 0.1), run(1e-3, 0, 0.2), run(2e-3, 0, 0.3)]
    chosen = choose(base(), runs, math.inf)
    assert (chosen.rate, chosen.steps, list(chosen.seeds)) == (2e-3, 60, [0])
    chosen = choose(base(), runs[:3], math.inf)
    assert list(chosen.seeds) == [0, 1, 2]
    assert chosen.first == chosen.seeds[0]
    assert chosen.seeds[2].validation > chosen.first.validation > chosen.seeds[1].validation


def test_none_is_chosen_where_nothing_was_learned():
    runs = whole(World(lambda *at: -0.1, proportional), "mica", 1)
    assert choose(base(), runs, math.inf) is None
    assert choose(base(), [], math.inf) is None
    assert common_limit(base(), {"mica": runs}) == 0.0


def test_the_common_limit_is_what_the_middle_method_forgets():
    def forgets(method, rate, step):
        return {"mica": 0.1, "lora": 0.2, "random": 0.4, "full": 0.8, "none": 5.0}[method] * step / 60

    world = World(alike, forgets)
    runs = {name: whole(world, name, 1) for name in ("full", "mica", "random", "lora")}
    assert common_limit(base(), runs) == pytest.approx(0.2)
    del runs["mica"]
    assert common_limit(base(), runs) == pytest.approx(0.4)
    runs["none"] = whole(World(lambda *at: -1.0, forgets), "none", 1)  # has learned nothing, and has no say
    assert common_limit(base(), runs) == pytest.approx(0.4)
    gains = {"mica": whole(World(alike, lambda *at: -0.3), "mica", 1)}
    assert common_limit(base(), gains) == 0.0
