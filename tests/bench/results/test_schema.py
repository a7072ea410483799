"""Result files, and the intervals of their ratios."""

import math
import random

import pytest

from bench.results import schema
from bench.results.names import BACKWARD, BARE, BOTH, DEVICE_TIME, FAST, FORWARD, STOCK, WALL
from bench.results.schema import Group, Result, Timing


def layer(part, implementations, **axes):
    return Group(f"one layer, {part}", {"suite": "layer", "pass": part, **axes}, implementations)


def passes(**axes):
    return [
        layer(part, {BARE: Timing([1.0, 2.0]), FAST: Timing([1.0, 2.0], {"saved_mb": mb})}, **axes)
        for part, mb in ((FORWARD, 3.0), (BACKWARD, 5.0))
    ]


def test_a_result_round_trips_through_its_file(tmp_path):
    result = Result({"cpu": "A"}, passes(), [{"group": "a", "why": "b"}])
    result.save(tmp_path / "run.json")
    assert Result.load(tmp_path / "run.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    Result({}, []).save(tmp_path / "run.json")
    assert Result.load(tmp_path / "run.json") == Result({}, [])


def test_passes_are_summed_round_by_round_and_once():
    result = Result({}, passes(clock=WALL) + passes(clock=DEVICE_TIME), [{"group": "a", "why": "b"}])
    summed = result.with_both()
    assert [group.axes for group in summed.groups[4:]] == [
        {"suite": "layer", "pass": BOTH, "clock": WALL},
        {"suite": "layer", "pass": BOTH, "clock": DEVICE_TIME},
    ]
    both = summed.groups[-1]
    assert both.name == f"one layer, {BOTH}"
    assert both.timings[FAST] == Timing([2.0, 4.0], {"saved_mb": 3.0})
    assert summed.refused == result.refused
    assert summed.with_both() == summed


def test_a_sum_has_the_implementations_and_rounds_of_both_passes():
    forward, backward = passes()
    forward.timings |= {STOCK: Timing([1.0, 1.0]), FAST: Timing([1.0, 2.0, 3.0])}
    both = Result({}, [forward, backward]).with_both().groups[-1]
    assert {name: timing.seconds for name, timing in both.timings.items()} == {
        BARE: [2.0, 4.0],
        FAST: [2.0, 4.0],
    }
    del backward.timings[BARE], backward.timings[FAST]
    assert Result({}, [forward, backward]).with_both().groups == [forward, backward]


@pytest.mark.parametrize(
    ("refusal", "implementation", "expected"),
    [
        ({"group": "a, b"}, FAST, True),
        ({"group": "a"}, FAST, True),
        ({"group": "a, b, c"}, FAST, False),
        ({"group": "a, bc"}, FAST, False),
        ({"group": "a,"}, FAST, False),
        ({"group": "a, b", "implementation": FAST}, FAST, True),
        ({"group": "a", "implementation": STOCK}, FAST, False),
    ],
)
def test_a_refusal_holds_for_groups_whose_names_extend_its_own(refusal, implementation, expected):
    assert schema.is_refused(refusal, "a, b", implementation) == expected


def test_a_ratio_is_taken_within_a_round():
    group = Group("", {}, {BARE: Timing([1.0, 10.0, 3.0]), FAST: Timing([2.0, 10.0, 9.0])})
    ratio = group.ratio(FAST, BARE)
    assert ratio.median == 2.0
    assert ratio.low <= 1.0
    assert ratio.high >= 3.0


def test_an_overhead_is_taken_within_a_round_over_the_baselines_median():
    seconds = {BARE: [1.0, 2.0, 1.0], "LoRA": [2.0, 2.1, 3.0], FAST: [1.5, 2.25, 1.0]}
    group = Group("", {}, {name: Timing(values) for name, values in seconds.items()})
    assert group.overhead(FAST, "LoRA").median == 0.25  # 0.5, 0.25, 0 over the median of 1, 0.1, 2
    assert group.overhead(FAST, BARE) is None


@pytest.mark.parametrize("count", [2, 3, 5, 6, 9, 12, 20])
def test_intervals_hold_the_median_with_95_percent(count):
    draw, times = random.Random(count), 4000
    held = 0
    for _ in range(times):
        interval = schema.interval([math.exp(draw.gauss(0.0, 0.1)) for _ in range(count)])
        held += interval.low <= 1.0 <= interval.high
    assert held / times >= 0.94
    if count >= 6:  # and no wider than they need to be: the next narrower one holds less
        assert held / times <= 0.995


def test_one_round_has_no_interval():
    ratio = schema.interval([2.0])
    assert (ratio.low, ratio.high) == (0.0, math.inf)
    assert str(ratio) == "2.000 (one round)"
