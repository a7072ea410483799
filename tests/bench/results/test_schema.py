"""Result files, and the intervals of their ratios."""

import json
import math
import random
from importlib import import_module

import pytest

results = import_module("bench.results")
BARE, FAST, FORWARD, BACKWARD, BOTH = (
    results.BARE,
    results.FAST,
    results.FORWARD,
    results.BACKWARD,
    results.BOTH,
)


def benchmark(group, rival, seconds, **facts):
    axes = {"suite": "layer", "pass": group.rpartition(", ")[2]}
    return {
        "group": group,
        "extra_info": {"rival": rival, "axes": axes, **facts},
        "stats": {"median": seconds},
    }


def raw(benchmarks):
    """As pytest-benchmark writes it."""
    info = {"python_version": "3.11", "machine": "x86_64", "cpu": {"brand_raw": "A"}, "threads": 2}
    commit = {"id": "abc", "dirty": False}
    head = {"machine_info": info | {"node": "secret"}, "commit_info": commit, "datetime": "2026-01-01"}
    return {**head, "benchmarks": benchmarks}


ROUNDS = [
    benchmark(f"one layer, {part}", rival, seconds, **facts)
    for seconds in (1.0, 2.0)
    for part in (FORWARD, BACKWARD)
    for rival, facts in ((BARE, {}), (FAST, {"saved_mb": 3.0}))
]


def test_rounds_are_folded_and_come_back_from_the_file(tmp_path):
    result = results.fold(raw(ROUNDS))
    assert [group.name for group in result.groups] == ["one layer, forward", "one layer, backward"]
    assert result.groups[0].rivals[FAST] == results.Rival([1.0, 2.0], {"saved_mb": 3.0})
    assert "node" not in result.machine
    result.save(tmp_path / "run.json")
    assert results.Result.load(tmp_path / "run.json") == result
    (tmp_path / "raw.json").write_text(json.dumps(raw(ROUNDS)))
    assert results.Result.load(tmp_path / "raw.json") == result


def test_a_cell_in_which_rounds_are_missing_has_no_number():
    result = results.fold(raw(ROUNDS[:-1]))
    assert [group.name for group in result.groups] == ["one layer, forward"]
    assert result.refused == [{"group": "one layer, backward", "why": "not every rival has all rounds"}]


def test_passes_are_summed_round_by_round():
    both = results.fold(raw(ROUNDS)).with_both().groups[-1]
    assert both.axes["pass"] == BOTH
    assert both.name == f"one layer, {BOTH}"
    assert both.rivals[FAST].seconds == [2.0, 4.0]


def test_a_ratio_is_of_one_round():
    group = results.Group(
        "", {}, {BARE: results.Rival([1.0, 10.0, 3.0]), FAST: results.Rival([2.0, 10.0, 9.0])}
    )
    ratio = group.ratio(FAST, BARE)
    assert ratio.median == 2.0
    assert ratio.low <= 1.0
    assert ratio.high >= 3.0


def test_an_overhead_is_of_one_round_over_the_median_of_the_baselines():
    seconds = {BARE: [1.0, 2.0, 1.0], "LoRA": [2.0, 2.1, 3.0], FAST: [1.5, 2.25, 1.0]}
    group = results.Group("", {}, {name: results.Rival(values) for name, values in seconds.items()})
    assert group.overhead(FAST, "LoRA").median == 0.25  # 0.5, 0.25, 0 over the median of 1, 0.1, 2
    assert group.overhead(FAST, BARE) is None


@pytest.mark.parametrize("count", [2, 3, 5, 6, 9, 12, 20])
def test_intervals_hold_the_median_with_95_percent(count):
    draw, times = random.Random(count), 4000
    held = 0
    for _ in range(times):
        found = results.interval([math.exp(draw.gauss(0.0, 0.1)) for _ in range(count)])
        held += found.low <= 1.0 <= found.high
    assert held / times >= 0.94
    if count >= 6:  # and no wider than they need to be: the next narrower one holds less
        assert held / times <= 0.995


def test_of_one_round_nothing_is_known():
    ratio = results.interval([2.0])
    assert (ratio.low, ratio.high) == (0.0, math.inf)
    assert str(ratio) == "2.000 (one round)"
