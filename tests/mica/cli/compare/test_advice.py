"""What would decide: by comparing with comparisons that have it."""

import math

import pytest

from mica.cli.compare.advice import needed
from mica.cli.compare.schedule import BASE, SEEDS, WHOLE, Comparison
from mica.cli.compare.verdict import verdict
from tests.mica.cli.compare.comparisons import World, alike, base, proportional, question, simulate, whole

PAIR = ("mica", "lora")


def ahead(method, rate, step):
    return alike(method, rate, step) + (0.05 * step / 60 if method == "lora" else 0.0)


def of(seeds, between_blocks, between_seeds, draw=0):
    """What is needed after a comparison of so many seeds: as found, and how certain the lead is now."""
    world = World(ahead, proportional, between_blocks, between_seeds, draw)
    runs = {name: whole(world, name, seeds) for name in PAIR}
    results = {f"{run['method']}{run['seed']}": run for some in runs.values() for run in some}
    found = verdict(base(), runs)
    other = next(iter(found.lead))
    return needed(Comparison(question(names=PAIR), results | {BASE: base(jobs=1)}), found, other), found


def test_what_is_needed_grows_with_the_noise():
    calm, wild = (of(2, 0.01, size)[0] for size in (0.02, 0.06))
    assert 2 < calm.seeds < wild.seeds
    assert calm.minutes < wild.minutes


def test_so_many_seeds_decide_in_most_comparisons():
    """As the lead was found smaller or larger than it is, not in all."""
    decided = 0
    asked = 0
    for draw in range(30):
        found, before = of(2, 0.02, 0.02, draw=draw)
        if found is None or before.best != "lora" or not before.tied:
            continue
        asked += 1
        decided += not of(max(3, found.seeds), 0.02, 0.02, draw=draw)[1].tied
    assert asked >= 8
    assert decided >= 0.5 * asked


def test_seeds_do_not_help_where_documents_differ_too_much():
    assert of(3, 0.15, 0.0001)[0] is None


def test_nothing_practical_is_said_to_be_so():
    _, found = of(2, 0.02, 0.02)
    (other,) = found.lead
    small = found._replace(lead={other: found.lead[other]._replace(mean=1e-6)})
    assert needed(Comparison(question(names=PAIR), {}), small, other) is None


def test_the_minutes_are_those_that_the_comparison_then_takes():
    asked = question(names=PAIR, rates=(1e-3, 2e-3))
    world = World(ahead, proportional, 0.01, 0.03)
    results = simulate(asked, world, lambda one: (2.0, 1.0, 0.1), jobs=1)
    comparison = Comparison(asked, results)
    found = verdict(comparison.base, comparison.by_method(WHOLE, SEEDS))
    wanted = needed(comparison, found, next(iter(found.lead)))
    more = asked._replace(seeds=wanted.seeds, budget=math.inf)
    simulate(more, world, lambda one: (2.0, 1.0, 0.1), jobs=1, results=results)
    assert max(one["ended"] for one in results.values()) / 60 == pytest.approx(wanted.minutes, abs=2)
