"""Verdicts on planted cases: nothing is found where nothing is, and what is there is found."""

import math

import numpy as np
import pytest
from scipy import stats

from mica.cli.compare.outcomes import RETAINED
from mica.cli.compare.verdict import FEWEST, HELD_OUT, RETAINED_DOCUMENTS, SEEDS, Part, _of_documents, verdict
from tests.mica.cli.compare.comparisons import (
    NAMES,
    World,
    alike,
    base,
    documents,
    proportional,
    whole,
)

PAIR = ("mica", "lora")


def claims(world, names=NAMES, seeds=(3, 3, 2, 2)):
    """The methods that are certainly worse than the best, and the verdict."""
    runs = {name: whole(world, name, number) for name, number in zip(names, seeds, strict=False)}
    found = verdict(base(), runs)
    return sorted(name for name, lead in found.lead.items() if lead.is_certain), found


@pytest.mark.parametrize("seeds", [(3, 3, 2, 2), (2, 2, 2, 2), (3, 3, 1, 1), (2, 2, 1, 1)])
@pytest.mark.parametrize("between_seeds", [0.005, 0.03])
def test_the_level_holds_over_many_comparisons(seeds, between_seeds):
    """Any claim at all is one; 5 % of 200 are 10, and 18 or more would then come by chance in 1 of 100."""
    wrong = 0
    for draw in range(100, 300):
        wrong += bool(claims(World(alike, proportional, 0.05, between_seeds, draw), seeds=seeds)[0])
    assert wrong < 18


def better(by):
    return lambda method, rate, step: alike(method, rate, step) + by * step / 60 * (method == "lora")


def test_a_planted_gain_is_found_and_one_below_the_noise_is_not():
    claimed = 0
    for draw in range(20):
        found, result = claims(World(better(0.2), proportional, 0.05, 0.01, draw))
        assert (result.best, found) == ("lora", ["full", "mica", "random"])
        for lead in result.lead.values():
            assert lead.mean - lead.half < 0.2 * 1.3  # the mean over blocks of what was planted
            assert lead.mean + lead.half > 0.2 * 0.7
        claimed += bool(claims(World(better(0.002), proportional, 0.05, 0.02, draw))[0])
    assert claimed <= 2


def test_nothing_is_claimed_of_one_seed_each():
    found, result = claims(World(better(0.5), proportional, 0.01), seeds=(1, 1, 1, 1))
    assert (result.best, found) == ("lora", [])
    assert {(lead.half, lead.doubt) for lead in result.lead.values()} == {(math.inf, SEEDS)}


def test_an_order_that_suits_all_methods_hides_no_gain():
    """What a seed changes for all of them alike is no noise of their differences."""
    calm, wild = (claims(World(better(0.15), proportional, 0.05, 0.005, 3, order)) for order in (0.0, 0.2))
    assert calm[0] == wild[0] == ["full", "mica", "random"]
    for name, lead in wild[1].lead.items():
        same = calm[1].lead[name]
        assert (lead.mean, lead.half) == (pytest.approx(same.mean), pytest.approx(same.half))


def test_only_seeds_that_both_have_are_compared():
    world = World(better(0.15), proportional, 0.0, 0.0, 3, by_order=0.05)
    _, found = claims(world, seeds=(1, 3, 2, 2))
    leads = [lead.mean for lead in found.lead.values()]
    assert leads == pytest.approx([0.15 * (1 + world.of_block["test"].mean())] * 3)


def test_seeds_that_differ_widen_the_interval():
    calm, wild = (
        claims(World(better(0.1), proportional, 0.05, seeds))[1].lead["full"] for seeds in (0.001, 0.1)
    )
    assert wild.half > 2 * calm.half
    assert (calm.doubt, wild.doubt) == (HELD_OUT, SEEDS)


def test_the_interval_is_that_of_the_paired_t_test_where_seeds_agree():
    world = World(better(0.1), proportional, 0.05)
    runs = {name: whole(world, name, 1) for name in PAIR}
    for some in runs.values():
        some += [some[0] | {"seed": seed} for seed in range(1, 5)]
    found = verdict(base(), runs)
    ours, theirs = (found.choices[name].first.learned for name in ("lora", "mica"))
    both = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    lead = found.lead["mica"]
    assert (lead.mean - lead.half, lead.mean + lead.half) == pytest.approx((both.low, both.high))


def test_who_learns_more_by_forgetting_more_does_not_win():
    def amount(of_full, of_mica):
        return lambda method, rate, step: (of_full if method == "full" else of_mica) * step / 60

    world = World(amount(0.6, 0.4), amount(1.0, 0.1), 0.01, 0.001)
    found, equal = claims(world, ("mica", "full"), (3, 3))
    assert equal.limit == pytest.approx(0.1)
    assert (equal.best, found) == ("mica", ["full"])
    assert equal.choices["full"].mean("learned") == pytest.approx(0.06, abs=0.02)  # a tenth of its way


def test_who_learned_nothing_is_not_in_it():
    def learns(method, rate, step):
        return -0.1 if method == "mica" else 0.2 * step / 60

    found = claims(World(learns, proportional, 0.01, 0.01))[1]
    assert {*found.choices} == {"lora", "random", "full"}
    nothing = claims(World(lambda *at: -0.1, proportional))[1]
    assert (nothing.best, nothing.lead) == (None, {})


def parts(found, name):
    return {part.source: part for part in found.lead[name].parts}


@pytest.mark.parametrize("sizes", [(1,) * 12, (6, 3, 2, 1), (9, 1, 1, 1)])
def test_the_variance_between_documents_is_unbiased_whatever_their_sizes(sizes):
    generator = np.random.default_rng(0)
    of_block = np.repeat(np.arange(len(sizes)), sizes)
    means, variances = [], []
    for _ in range(4000):
        blocks = generator.normal(0, 1, len(sizes))[of_block]
        means.append(blocks.mean())
        variances.append(_of_documents(HELD_OUT, blocks, of_block).variance)
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.1)


def test_too_few_documents_claim_nothing():
    runs = {name: whole(World(better(0.5), proportional, 0.01, 0.001), name, 3) for name in PAIR}
    for number, is_certain in ((1, False), (FEWEST - 1, False), (6, True)):
        found = verdict(base(documents=documents(number)), runs)
        assert found.lead["mica"].is_certain == is_certain
        assert (parts(found, "mica")[HELD_OUT] == Part(HELD_OUT, 0.0, 0)) != is_certain


def test_forgetting_is_in_the_interval_where_it_scales_what_was_learned():
    """The same trainings, where one forgets more than the other and is scaled back, and where none does."""

    def lead(of_mica, retained=10):
        def forgets(method, rate, step):
            return of_mica * (2 if method == "lora" else 1) * step / 60

        generator = np.random.default_rng(0)
        runs = {name: whole(World(better(0.2), forgets, 0.02, 0.002), name, 3) for name in PAIR}
        for some in runs.values():
            noise = {name: generator.normal(0, 0.05, 5) for name in RETAINED}
            for run in some:
                for name in RETAINED:
                    run["points"][0][name] = (np.array(run["points"][0][name]) + noise[name]).tolist()
        found = verdict(base(documents=documents(retained=retained)), runs)
        (lead,) = found.lead.values()
        return lead

    scaled, free, of_one_document = lead(0.1), lead(-0.1), lead(0.1, retained=1)
    assert {part.source for part in scaled.parts} == {HELD_OUT, RETAINED_DOCUMENTS, SEEDS}
    assert {part.source for part in free.parts} == {HELD_OUT, SEEDS}
    assert scaled.half > 1.5 * free.half
    assert (of_one_document.half, of_one_document.doubt) == (math.inf, RETAINED_DOCUMENTS)
