"""Rounds of a cell: turns, what is refused, when they end; and how often an interval then holds the truth."""

from itertools import count

import numpy as np
import pytest

from bench.results import journal
from bench.results.cell import interval
from bench.results.names import FAST, STOCK
from bench.suites import harness, rounds
from bench.suites.rounds import LOOKS, Once

CELL = "a cell"


@pytest.fixture(autouse=True)
def written(monkeypatch, tmp_path):
    """The journal's entries of a kind so far."""
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path / "run.jsonl"))
    monkeypatch.setattr(harness, "refusals", {})
    monkeypatch.setattr(Once, "long", set())
    monkeypatch.setattr(rounds, "IS_DRY", False)
    monkeypatch.setattr(rounds, "IS_CPU_TIME", True)
    return lambda kind: [entry for entry in journal.read() if entry["kind"] == kind]


@pytest.fixture
def clock(monkeypatch):
    """What `Once` measures, settable: (CPU time, wall clock) of the next samples."""
    seconds = [1e-3, 2e-3]

    def sample(call, calls):
        results = [call() for _ in range(calls)]
        return rounds.clocks.Sample(*seconds, results[-1])

    monkeypatch.setattr(rounds.clocks, "sample", sample)
    return seconds


def test_an_untimed_call_comes_before_the_timed_ones_each_on_an_operand_of_its_own(clock):
    calls, made = [], count()
    once = Once(CELL, FAST)
    once(calls.append, {}, make=lambda: next(made), counted=1.0)
    assert calls == [0, 1]
    (sample,) = once.samples
    assert (sample["seconds"], sample["wall"], sample["facts"]) == (1e-3, 2e-3, {"counted": 1.0})
    once(lambda: calls.append(2), {}, iterations=3)
    assert calls == [0, 1, *[2] * (1 + 3)]


def test_with_more_threads_than_one_the_clock_counts(clock, monkeypatch):
    monkeypatch.setattr(rounds, "IS_CPU_TIME", False)
    once = Once(CELL, FAST)
    once(lambda: None, {})
    (sample,) = once.samples
    assert sample["seconds"] == 2e-3
    assert "wall" not in sample


def test_a_long_call_has_an_untimed_one_before_its_first_sample_only(clock):
    clock[:] = [3.0, 3.0]
    calls = []
    for name in (FAST, FAST, STOCK):
        Once(CELL, name)(lambda name=name: calls.append(name), {})
    assert calls == [FAST] * 3 + [STOCK] * 2


def noise(draws):
    """A sample function whose CPU time is 1 for stock PEFT and drawn for mica.fast."""

    def sample(once, name):
        seconds = next(draws) if name == FAST else 1.0
        once.add(seconds, {}, {}, wall=seconds)

    return sample


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ([1.0, 1.04] * 32, 8),
        ([1.0, 1.2] * 4 + [1.1] * 56, 32),
        ([1.0, 1.2] * 32, 64),
    ],
)
def test_rounds_end_when_the_ratio_is_known_or_at_64(written, draws, expected):
    rounds.rounds(CELL, [STOCK, FAST], noise(iter(draws)))
    samples = written("sample")
    assert [one["implementation"] for one in samples] == [STOCK, FAST] * expected
    (group,) = journal.fold(samples, {}).groups
    assert len(group.timings[FAST].wall) == expected
    assert group.ratio(FAST, STOCK).is_narrow == (expected < 64)


def test_rounds_end_when_time_is_up_but_not_before_the_fewest(written, monkeypatch):
    monkeypatch.setattr(rounds.time, "monotonic", count(0, 10).__next__)  # a round takes 10 s
    rounds.rounds(CELL, [STOCK, FAST], noise(iter([1.0, 1.2] * 32)), seconds=75.0)
    assert len(written("sample")) == 2 * 4
    rounds.rounds("another", [STOCK, FAST], noise(iter([1.0, 1.2] * 32)), seconds=1.0, fewest=3)
    assert len(written("sample")) == 2 * (4 + 3)


def test_one_that_raises_is_refused_and_the_others_continue(written):
    draw = noise(iter([1.0] * 64))
    taken = count()

    def sample(once, name):
        assert name != "wrong" or next(taken) < 2, "the result is wrong"
        draw(once, name)

    with pytest.raises(pytest.fail.Exception, match="no number for a cell, wrong: the result is wrong"):
        rounds.rounds(CELL, ["wrong", STOCK, FAST], sample)
    (group,) = journal.fold(journal.read(), {}).groups
    assert {name: len(timing.seconds) for name, timing in group.timings.items()} == {STOCK: 8, FAST: 8}


def test_a_cell_that_cannot_be_prepared_is_refused_and_not_tried_again(written):
    def check():
        assert not written("refused")
        raise ValueError("no such model")

    for _ in range(2):
        with pytest.raises(pytest.fail.Exception, match="no number for a cell: ValueError: no such model"):
            rounds.prepared(CELL, check)


DRAWS = {
    "normal": lambda draw, size: draw.standard_normal(size),
    "heavy tails": lambda draw, size: draw.standard_t(2, size),
    "two levels": lambda draw, size: draw.choice((-1.0, 1.0), size) + 0.2 * draw.standard_normal(size),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("scale", [0.02, 0.06, 0.2])
def test_intervals_hold_the_median_though_rounds_end_where_they_are_narrow(kind, scale):
    """The true median is 1. Looks at 8, 16, 32 and 64 rounds; a look after each would hold it in 84 %."""
    draw = np.random.default_rng(0)
    held = 0
    times = 1500
    for _ in range(times):
        ratios = np.exp(scale * DRAWS[kind](draw, LOOKS[-1])).tolist()
        for look in LOOKS:
            found = interval(ratios[:look])
            if found.is_narrow:
                break
        held += found.low <= 1.0 <= found.high
    assert held / times >= 0.93
