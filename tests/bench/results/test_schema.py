"""Ratios, sums and the intervals of their medians."""

import math
import random

import pytest

from bench.results import schema
from bench.results.names import BACKWARD, BARE, FAST, FORWARD, STOCK
from bench.results.schema import Group, Result, Timing


def group(seconds, **axes):
    return Group("", axes, {name: Timing(values) for name, values in seconds.items()})


def test_a_sum_has_the_implementations_and_rounds_of_both_passes():
    forward = group({BARE: [1.0, 2.0], STOCK: [1.0, 1.0], FAST: [1.0, 2.0, 3.0]}, **{"pass": FORWARD})
    backward = group({BARE: [1.0, 2.0], FAST: [1.0, 3.0]}, **{"pass": BACKWARD})
    both = Result({}, [forward, backward]).with_both().groups[-1]
    assert both.timings == {BARE: Timing([2.0, 4.0]), FAST: Timing([2.0, 5.0])}
    backward.timings.clear()
    assert Result({}, [forward, backward]).with_both().groups == [forward, backward]


def test_a_ratio_is_taken_within_a_round():
    ratio = group({BARE: [1.0, 10.0, 3.0], FAST: [2.0, 10.0, 9.0]}).ratio(FAST, BARE)
    assert ratio.median == 2.0
    assert ratio.low <= 1.0
    assert ratio.high >= 3.0


def test_an_overhead_is_taken_within_a_round_over_the_baselines_median():
    cell = group({BARE: [1.0, 2.0, 1.0], "LoRA": [2.0, 2.1, 3.0], FAST: [1.5, 2.25, 1.0]})
    assert cell.overhead(FAST, "LoRA").median == 0.25  # 0.5, 0.25, 0 over the median of 1, 0.1, 2
    assert cell.overhead(FAST, BARE) is None


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
