"""A result, from the journal's lines to its figures: sums, ratios, their intervals, and what is refused."""

import json
import math
import random

import pytest

from bench.results import journal
from bench.results.cell import Group, Timing, interval
from bench.results.names import BACKWARD, BARE, DEVICE_TIME, FAST, FORWARD, STOCK, WALL
from bench.results.schema import Result


def group(seconds, **axes):
    """implementation -> its seconds in each round, as a cell's group."""
    return Group("", axes, {name: Timing(values) for name, values in seconds.items()})


def test_a_sum_has_the_implementations_and_rounds_of_both_passes():
    forward = group({BARE: [1.0, 2.0], STOCK: [1.0, 1.0], FAST: [1.0, 2.0, 3.0]}, **{"pass": FORWARD})
    backward = group({BARE: [1.0, 2.0], FAST: [1.0, 3.0]}, **{"pass": BACKWARD})
    *_, both = Result({}, [forward, backward]).with_both().groups
    assert both.timings == {BARE: Timing([2.0, 4.0]), FAST: Timing([2.0, 5.0])}


def test_there_is_no_sum_where_no_implementation_has_both_passes():
    forward = group({FAST: [1.0]}, **{"pass": FORWARD})
    backward = group({}, **{"pass": BACKWARD})
    other_cell = group({FAST: [1.0]}, dropout=0.1, **{"pass": BACKWARD})  # it has one more axis
    groups = [forward, backward, other_cell]
    assert Result({}, groups).with_both().groups == groups


def test_ratios_are_taken_within_a_round():
    ratio = group({BARE: [1.0, 10.0, 3.0], FAST: [2.0, 10.0, 9.0]}).ratio(FAST, BARE)  # by round 2, 1 and 3
    assert ratio.low <= 1.0 < ratio.median == 2.0 < 3.0 <= ratio.high


def test_one_slow_round_does_not_move_the_median():
    assert interval([*[1.0] * 5, 9.0]).median == 1.0


def test_one_round_has_no_interval():
    once = interval([2.0])
    assert (once.low, once.high, str(once)) == (0.0, math.inf, "2.000 (one round)")


@pytest.mark.parametrize("count", [2, 3, 5, 6, 8, 9, 20])
def test_intervals_hold_the_median_with_95_percent(count):
    """The values are skewed, their median is 1; the share found in 4000 trials is off by up to 1 %."""
    draw, times = random.Random(count), 4000
    held = 0
    for _ in range(times):
        found = interval([math.exp(draw.gauss(0.0, 0.1)) for _ in range(count)])
        held += found.low <= 1.0 <= found.high
    assert held / times >= 0.94
    if count >= 6:  # no wider than need be: the range of 8 values holds it with 99.2 %, that of 7 with 98.4
        assert held / times <= 0.995


CELL = "layer, 8 tokens, forward"
ALL = {BARE, STOCK, FAST}
WITHOUT_FAST = {BARE, STOCK}
# A journal: the machine, and one round of each implementation by each clock
ENTRIES = [{"kind": "machine", "facts": {"device": "a card"}}]
ENTRIES += [
    {"kind": "sample", "cell": CELL, "group": f"{CELL}, {clock}", "axes": {"clock": clock}}
    | {"implementation": name, "seconds": 1.0, "facts": {}, "work": {"tokens": 8.0}}
    for clock in (WALL, DEVICE_TIME)
    for name in (BARE, STOCK, FAST)
]


def test_what_is_written_is_read_except_a_truncated_line(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    monkeypatch.setenv(journal.VARIABLE, str(path))
    assert journal.read() == []
    for entry in ENTRIES:
        journal.write(**entry)
    with path.open("a") as file:
        file.write(json.dumps(ENTRIES[0])[:-9])
    assert journal.read() == journal.read(path) == ENTRIES


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
@pytest.mark.parametrize(
    ("refused", "implementation", "left_by_wall", "left_by_device"),
    [
        (CELL, FAST, WITHOUT_FAST, WITHOUT_FAST),
        ("layer, 8 tokens", FAST, WITHOUT_FAST, WITHOUT_FAST),
        (f"{CELL}, {WALL}", FAST, WITHOUT_FAST, ALL),
        (f"{CELL}, {WALL}", None, None, ALL),
        (CELL, None, None, None),
        ("layer, 8", None, ALL, ALL),
        (f"{CELL}, with something", None, ALL, ALL),
    ],
)
def test_a_refusal_names_an_implementation_a_cell_or_a_clock(
    refused, implementation, left_by_wall, left_by_device, order
):
    """What is left of both groups, None for nothing, if the refusal is read before or after the samples.

    It holds for the groups whose names begin with it as a whole: "layer, 8" is no beginning of CELL.
    """
    refusal = {"group": refused, "implementation": implementation, "why": "wrong"}
    result = journal.fold([{"kind": "refused", **refusal}, *ENTRIES][::order], {"device": "another"})
    left = {group.axes["clock"]: {*group.timings} for group in result.groups}
    assert (left.get(WALL), left.get(DEVICE_TIME)) == (left_by_wall, left_by_device)
    assert result.refused == [refusal]
    assert result.machine == {"device": "a card"}
