"""Ratios, sums and the intervals of their medians; what a refusal takes from a result; the journal."""

import json
import math
import random

import pytest

from bench.results import journal
from bench.results.cell import Group, Timing, interval
from bench.results.names import BACKWARD, BARE, DEVICE_TIME, FAST, FORWARD, STOCK, WALL
from bench.results.schema import Result


def group(seconds, **axes):
    return Group("", axes, {name: Timing(values) for name, values in seconds.items()})


def test_a_sum_has_the_implementations_and_rounds_of_both_passes():
    forward = group({BARE: [1.0, 2.0], STOCK: [1.0, 1.0], FAST: [1.0, 2.0, 3.0]}, **{"pass": FORWARD})
    backward = group({BARE: [1.0, 2.0], FAST: [1.0, 3.0]}, **{"pass": BACKWARD})
    *_, both = Result({}, [forward, backward]).with_both().groups
    assert both.timings == {BARE: Timing([2.0, 4.0]), FAST: Timing([2.0, 5.0])}
    backward.timings.clear()
    other = group({FAST: [1.0]}, dropout=0.1, **{"pass": BACKWARD})  # one more axis: another cell
    groups = [forward, backward, other]
    assert Result({}, groups).with_both().groups == groups


def test_ratios_are_taken_within_a_round():
    ratio = group({BARE: [1.0, 10.0, 3.0], FAST: [2.0, 10.0, 9.0]}).ratio(FAST, BARE)
    assert ratio.low <= 1.0 < ratio.median == 2.0 < 3.0 <= ratio.high
    assert interval([*[1.0] * 5, 9.0]).median == 1.0
    once = interval([2.0])
    assert (once.low, once.high, str(once)) == (0.0, math.inf, "2.000 (one round)")


@pytest.mark.parametrize("count", [2, 3, 5, 6, 8, 9, 20])
def test_intervals_hold_the_median_with_95_percent(count):
    draw, times = random.Random(count), 4000
    held = 0
    for _ in range(times):
        found = interval([math.exp(draw.gauss(0.0, 0.1)) for _ in range(count)])
        held += found.low <= 1.0 <= found.high
    assert held / times >= 0.94
    if count >= 6:  # and no wider than they need to be: the next narrower one holds less
        assert held / times <= 0.995


CELL, ALL, OTHERS = "layer, 8 tokens, forward", {BARE, STOCK, FAST}, {BARE, STOCK}
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
    ("refused", "implementation", "by_wall", "by_device"),
    [
        (CELL, FAST, OTHERS, OTHERS),
        ("layer, 8 tokens", FAST, OTHERS, OTHERS),
        (f"{CELL}, {WALL}", FAST, OTHERS, ALL),
        (f"{CELL}, {WALL}", None, None, ALL),
        (CELL, None, None, None),
        ("layer, 8", None, ALL, ALL),
        (f"{CELL}, with something", None, ALL, ALL),
    ],
)
def test_a_refusal_names_an_implementation_a_cell_or_a_clock(
    refused, implementation, by_wall, by_device, order
):
    refusal = {"group": refused, "implementation": implementation, "why": "wrong"}
    result = journal.fold([{"kind": "refused", **refusal}, *ENTRIES][::order], {"device": "another"})
    groups = {one.axes["clock"]: {*one.timings} for one in result.groups}
    assert (groups.get(WALL), groups.get(DEVICE_TIME)) == (by_wall, by_device)
    assert result.refused == [refusal]
    assert result.machine == {"device": "a card"}
