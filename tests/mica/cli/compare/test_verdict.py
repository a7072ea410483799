"""Verdicts on planted cases: nothing is found where nothing is, and what is there is found."""

import math

import numpy as np
import pytest
from scipy import stats

from mica.cli.compare.outcomes import RETAINED
from mica.cli.compare.verdict import FEWEST, HELD_OUT, RETAINED_DOCUMENTS, SEEDS, Part, _of_documents, verdict
from tests.mica.cli.compare.comparisons import NAMES, SIZES, World, alike, base, proportional, whole


def claims(world, names=NAMES, seeds=(3, 3, 2, 2), **more):
    """The methods that are certainly worse than the best, and the verdict."""
    runs = {name: whole(world, name, number) for name, number in zip(names, seeds, strict=False)}
    found = verdict(base(), runs, **more)
    return [name for name in found.lead if name not in found.tied], found


@pytest.mark.parametrize("seeds", [(3, 3, 2, 2), (2, 2, 2, 2), (3, 3, 1, 1), (2, 2, 1, 1)])
@pytest.mark.parametrize("between_seeds", [0.005, 0.03])
def test_the_level_holds_over_many_comparisons(seeds, between_seeds):
    """Any claim at all is one; 5 % of 200 are 10, and 18 or more would then come by chance in 1 of 100."""
    wrong = 0
    for draw in range(100, 300):
        wrong += bool(claims(World(alike, proportional, 0.05, between_seeds, draw), seeds=seeds)[0])
    assert wrong < 18


def better(by):
    def learns(method, rate, step):
        return alike(method, rate, step) + (by * step / 60 if method == "lora" else 0.0)

    return learns


def test_a_planted_gain_is_found():
    for draw in range(20):
        found, result = claims(World(better(0.15), proportional, 0.05, 0.01, draw))
        assert result.best == "lora"
        assert sorted(found) == ["full", "mica", "random"]
        for name in found:
            lead = result.lead[name]
            assert lead.mean - lead.half < 0.15 * 1.3  # the mean over blocks of what was planted
            assert lead.mean + lead.half > 0.15 * 0.7


def test_a_gain_below_the_noise_is_no_difference():
    found = [claims(World(better(0.002), proportional, 0.05, 0.02, draw))[0] for draw in range(20)]
    assert sum(map(bool, found)) <= 2


def test_nothing_is_claimed_of_one_seed_each():
    found, result = claims(World(better(0.5), proportional, 0.01, 0.0), seeds=(1, 1, 1, 1))
    assert not found
    assert result.best == "lora"
    assert {lead.half for lead in result.lead.values()} == {math.inf}


def test_an_order_that_suits_all_methods_hides_no_gain():
    """What a seed changes for all of them alike is no noise of their differences."""
    calm, wild = (claims(World(better(0.15), proportional, 0.05, 0.005, 3, order))[1] for order in (0.0, 0.2))
    assert sorted(name for name in wild.lead if name not in wild.tied) == ["full", "mica", "random"]
    for name in wild.lead:
        assert wild.lead[name].mean == pytest.approx(calm.lead[name].mean)
        assert wild.lead[name].half == pytest.approx(calm.lead[name].half)


def test_only_seeds_that_both_have_are_compared():
    world = World(better(0.15), proportional, 0.0, 0.0, 3, by_order=0.05)
    _, found = claims(world, seeds=(1, 3, 2, 2))
    leads = [lead.mean for lead in found.lead.values()]
    assert found.best == "lora"
    assert leads == pytest.approx([0.15 * (1 + world.of_block["test"].mean())] * 3)


def test_seeds_that_differ_widen_the_interval():
    _, calm = claims(World(better(0.1), proportional, 0.05, 0.001))
    _, wild = claims(World(better(0.1), proportional, 0.05, 0.1))
    assert wild.lead["full"].half > 2 * calm.lead["full"].half


def test_the_interval_is_that_of_the_paired_t_test_where_seeds_agree():
    world = World(better(0.1), proportional, 0.05)
    runs = {name: whole(world, name, 1) for name in ("mica", "lora")}
    for some in runs.values():
        some += [some[0] | {"seed": seed} for seed in range(1, 5)]
    found = verdict(base(), runs)
    ours, theirs = (found.choices[name].first.learned for name in ("lora", "mica"))
    both = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    lead = found.lead["mica"]
    assert (lead.mean - lead.half, lead.mean + lead.half) == pytest.approx((both.low, both.high))


def test_who_learns_more_by_forgetting_more_wins_only_where_that_is_allowed():
    def learns(method, rate, step):
        return (0.6 if method == "full" else 0.4) * step / 60

    def forgets(method, rate, step):
        return (1.0 if method == "full" else 0.1) * step / 60

    world = World(learns, forgets, 0.01, 0.001)
    assert claims(world, ("mica", "full"), (3, 3))[1].limit == pytest.approx(0.1)
    found, equal = claims(world, ("mica", "full"), (3, 3))
    assert (equal.best, found) == ("mica", ["full"])
    assert equal.choices["full"].mean("learned") == pytest.approx(0.06, abs=0.02)  # a tenth of its way
    found, free = claims(world, ("mica", "full"), (3, 3), limit=math.inf)
    assert (free.best, found) == ("full", ["mica"])


def test_who_learned_nothing_is_not_in_it():
    def learns(method, rate, step):
        return -0.1 if method == "mica" else 0.2 * step / 60

    found = claims(World(learns, proportional, 0.01, 0.01))[1]
    assert set(found.choices) == {"lora", "random", "full"}
    nothing = claims(World(lambda *at: -0.1, proportional))[1]
    assert nothing.best is None
    assert not nothing.lead


def labelled(documents, retained):
    """The base, with a document for each block."""
    sets = {"test": documents, RETAINED[0]: retained[:5], RETAINED[1]: retained[5:]}
    return base(documents=sets)


def parts(found, name):
    return {part.source: part for part in found.lead[name].parts}


def test_blocks_of_one_document_count_once():
    """Each document's blocks are copies of one: the interval is that of the documents."""
    documents = [number // 3 for number in range(SIZES["test"])]
    runs = {name: whole(World(better(0.1), proportional, 0.05), name, 2) for name in ("mica", "lora")}
    for some in runs.values():
        for run in some:
            (end,) = run["points"]
            end["test"] = [end["test"][3 * document] for document in documents]
    found = verdict(labelled(documents, [*range(10)]), runs)
    ours, theirs = (found.choices[name].mean("validation") for name in ("lora", "mica"))
    assert ours > theirs
    gaps = [
        np.mean([one.learned for one in found.choices[name].seeds.values()], axis=0)
        for name in ("lora", "mica")
    ]
    gaps = (gaps[0] - gaps[1])[::3]
    assert parts(found, "mica")[HELD_OUT].variance == pytest.approx(np.var(gaps, ddof=1) / 6)
    assert parts(found, "mica")[HELD_OUT].degrees == pytest.approx(5)


@pytest.mark.parametrize("sizes", [(1,) * 12, (6, 3, 2, 1), (9, 1, 1, 1)])
def test_the_variance_between_documents_is_unbiased_whatever_their_sizes(sizes):
    generator = np.random.default_rng(0)
    documents = np.repeat(np.arange(len(sizes)), sizes)
    means, variances = [], []
    for _ in range(4000):
        blocks = generator.normal(0, 1, len(sizes))[documents]
        means.append(blocks.mean())
        variances.append(_of_documents(HELD_OUT, blocks, documents).variance)
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.1)


def test_too_few_documents_claim_nothing():
    world = World(better(0.5), proportional, 0.01, 0.001)
    runs = {name: whole(world, name, 3) for name in ("mica", "lora")}
    for number in (1, FEWEST - 1):
        few = verdict(labelled([block % number for block in range(SIZES["test"])], [*range(10)]), runs)
        assert few.tied == ["mica"]
        assert parts(few, "mica")[HELD_OUT] == Part(HELD_OUT, 0.0, 0)
    enough = verdict(labelled([block % 6 for block in range(SIZES["test"])], [*range(10)]), runs)
    assert not enough.tied


def test_forgetting_is_in_the_interval_where_it_scales_what_was_learned():
    def forgets(method, rate, step):
        return (0.2 if method == "lora" else 0.1) * step / 60

    generator = np.random.default_rng(0)
    runs = {name: whole(World(better(0.2), forgets, 0.02, 0.002), name, 3) for name in ("mica", "lora")}
    for some in runs.values():
        noise = {name: generator.normal(0, 0.05, 5) for name in RETAINED}
        for run in some:
            for name in RETAINED:
                run["points"][0][name] = (np.array(run["points"][0][name]) + noise[name]).tolist()
    equal, free = verdict(base(), runs), verdict(base(), runs, math.inf)
    (method,) = equal.lead
    assert set(parts(equal, method)) == {HELD_OUT, RETAINED_DOCUMENTS, SEEDS}
    assert set(parts(free, "mica")) == {HELD_OUT, SEEDS}
    assert equal.lead[method].half > 1.5 * free.lead["mica"].half
    one = verdict(labelled([*range(SIZES["test"])], [0] * 10), runs)
    assert one.tied == [method]
    assert not verdict(labelled([*range(SIZES["test"])], [0] * 10), runs, math.inf).tied
