"""Learned at equal forgetting: by hand, on a few blocks."""

import numpy as np
import pytest

from mica.cli.compare.outcomes import ANY, Limit, Outcome, choose, common_limit, outcome
from mica.cli.compare.schedule import SEEDS, WHOLE, Planned
from tests.mica.cli.compare.comparisons import LOSS, SIZES, World, alike, base, proportional, whole


def end(forgotten, learned):
    """The end of a training, with two blocks of each text."""
    return Outcome(learned, np.array([0.5, 1.5]) * learned, np.array([0.8, 1.2]) * forgotten)


@pytest.mark.parametrize(
    ("forgotten", "limit", "share"),
    [
        (0.4, np.inf, 1),
        (0.4, 0.4, 1),
        (0.4, 0.4 - 1e-9, 1),  # no jump
        (0.4, 0.3, 0.75),
        (0.4, 0.0, 0),
        (-0.3, 0.0, 1),  # nothing forgotten, on the contrary
    ],
)
def test_an_update_that_forgets_too_much_is_scaled_back(forgotten, limit, share):
    found = end(forgotten, 0.44).within(Limit(limit))
    assert found.share == pytest.approx(share)
    assert found.validation == pytest.approx(share * 0.44)
    assert found.learned == pytest.approx([0.5 * share * 0.44, 1.5 * share * 0.44])
    assert found.forgotten.mean() <= limit + 1e-12


@pytest.mark.parametrize("of_limit", [None, np.array([0.1, 0.3])])
def test_the_doubt_is_how_blocks_of_the_retained_text_move_what_was_learned(of_limit):
    """Against the derivative by the weight of each block, by differences; blocks weigh alike before."""

    def learned(weights):
        forgotten = np.average([0.32, 0.48], weights=weights)
        limit = 0.2 if of_limit is None else np.average(of_limit, weights=weights)
        return 0.44 * limit / forgotten

    doubt = end(0.4, 0.44).within(Limit(0.2, of_limit)).doubt
    for block in range(2):
        more = np.ones(2)
        more[block] += 1e-6
        derivative = (learned(more) - learned(np.ones(2))) / 1e-6
        assert doubt[block] / 2 == pytest.approx(derivative, rel=1e-4)
    assert end(0.1, 0.44).within(Limit(0.2, of_limit)).doubt == 0


def test_an_outcome_is_the_change_since_the_base_at_the_last_step():
    before = base(retained=[1.0, 2.0, 3.0, 4.0, 5.0])
    (run,) = whole(World(alike, proportional), "mica", 1)
    (last,) = run["points"]
    last["retained"] = [loss + 0.5 for loss in before["retained"]]
    last["retained, the rest"] = [loss + 0.2 for loss in before["retained, the rest"]]
    run["points"] = [last | {"step": 1, "test": [0.0] * SIZES["test"]}, last]
    found = outcome(before, run)
    assert found.forgotten == pytest.approx([0.5] * 5 + [0.2] * 5)  # of all retained blocks
    assert found.learned == pytest.approx([LOSS - loss for loss in last["test"]])
    assert found.validation == pytest.approx(LOSS - np.mean(last["validation"]))


def test_a_short_training_is_compared_with_the_base_on_the_blocks_it_was_measured_on():
    before = base(retained=[1.0] * 5)  # the other retained blocks have another loss
    run = {"points": [{"step": 4, "validation": [2.0] * 6, "retained": [1.25] * 5}]}
    found = outcome(before, run)
    assert (found.validation, found.forgotten.tolist(), len(found.learned)) == (1.0, [0.25] * 5, 0)
    assert found.within(Limit(0.125)).validation == 0.5


def test_the_first_seed_chooses_and_brings_its_others():
    """A later seed, which only the chosen rates have, may be better by chance."""

    def run(rate, seed, learned):
        world = World(lambda *at: learned, proportional)
        return world.result(Planned(SEEDS if seed else WHOLE, "mica", rate, 60, seed))

    runs = [run(1e-3, 2, 0.9), run(1e-3, 1, 0.1), run(1e-3, 0, 0.2), run(2e-3, 0, 0.3)]
    chosen = choose(base(), runs, ANY)
    assert (chosen.rate, chosen.steps, list(chosen.seeds)) == (2e-3, 60, [0])
    chosen = choose(base(), runs[:3], ANY)
    assert list(chosen.seeds) == [0, 1, 2]
    assert chosen.seeds[2].validation > chosen.first.validation > chosen.seeds[1].validation


def test_none_is_chosen_where_nothing_was_learned():
    runs = whole(World(lambda *at: -0.1, proportional), "mica", 1)
    assert choose(base(), runs, ANY) is None
    assert choose(base(), [], ANY) is None
    assert common_limit(base(), {"mica": runs}) == Limit(0.0)


def test_the_common_limit_is_what_the_middle_method_forgets():
    def forgets(method, rate, step):
        return {"mica": 0.1, "lora": 0.2, "random": 0.4, "full": 0.8, "none": 5.0}[method] * step / 60

    world = World(alike, forgets)
    runs = {name: whole(world, name, 2) for name in ("full", "mica", "random", "lora")}
    limit = common_limit(base(), runs)
    assert limit.value == pytest.approx(0.2)
    assert limit.blocks == pytest.approx([0.2] * 10)
    del runs["mica"]
    runs["none"] = whole(World(lambda *at: -1.0, forgets), "none", 1)  # has learned nothing, and has no say
    assert common_limit(base(), runs).value == pytest.approx(0.4)
    gains = {"mica": whole(World(alike, lambda *at: -0.3), "mica", 1)}
    assert common_limit(base(), gains) == Limit(0.0)
