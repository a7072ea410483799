"""The journal of a run, and the result made from it, wherever the run was interrupted."""

import json

import pytest

from bench.results import journal
from bench.results.names import BARE, DEVICE_TIME, FAST, STOCK, WALL
from bench.results.schema import Result, Timing

CELL = "layer, 8 tokens, forward"


def sample(name, seconds, cell=CELL, clock=None, **facts):
    axes = {"suite": "layer", "pass": "forward", **({"clock": clock} if clock else {})}
    group = f"{cell}, {clock}" if clock else cell
    return {"kind": "sample", "cell": cell, "group": group, "axes": axes} | {
        "implementation": name,
        "seconds": seconds,
        "facts": facts,
    }


def rounds(*seconds, implementations=(BARE, STOCK, FAST), **kwargs):
    return [sample(name, second, **kwargs) for second in seconds for name in implementations]


def refused(group, name=None):
    return {
        "kind": "refused",
        "group": group,
        **({"implementation": name} if name else {}),
        "why": "dx is wrong",
    }


def folded(entries):
    return {group.name: {*group.timings} for group in journal.fold(entries, {}).groups}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path / "run.jsonl"))
    return tmp_path / "run.jsonl"


def test_what_is_written_is_read_except_a_truncated_line(path):
    assert journal.read() == []
    for entry in rounds(1.0):
        journal.write(**entry)
    whole = path.read_text()
    assert journal.read() == rounds(1.0)
    path.write_text(whole + json.dumps(sample(BARE, 2.0))[:-9])
    assert journal.read() == journal.read(path) == rounds(1.0)


def test_without_a_journal_nothing_is_written(path, monkeypatch):
    monkeypatch.delenv(journal.VARIABLE)
    journal.write("doing", test="a")
    assert not path.exists()
    assert journal.read() == []


def test_rounds_become_groups_with_what_was_counted():
    entries = [sample(FAST, 1.23456789, saved_mb=3.0), sample(FAST, 2.0), {"kind": "doing", "test": "a"}]
    result = journal.fold(entries, {"cpu": "A"})
    assert result.machine == {"cpu": "A"}
    (group,) = result.groups
    assert (group.name, group.axes) == (CELL, {"suite": "layer", "pass": "forward"})
    assert group.timings == {FAST: Timing([1.2346, 2.0], {"saved_mb": 3.0})}


def test_an_interrupted_round_does_not_count():
    entries = [*rounds(1.0, 2.0), sample(BARE, 3.0), sample(STOCK, 3.0)]
    (group,) = journal.fold(entries, {}).groups
    assert [timing.seconds for timing in group.timings.values()] == [[1.0, 2.0]] * 3
    other = rounds(1.0, 2.0, 3.0, cell="another")
    assert [len(one.timings[BARE].seconds) for one in journal.fold(entries + other, {}).groups] == [2, 3]


def test_an_implementation_that_is_refused_does_not_shorten_the_others():
    entries = (
        rounds(1.0, implementations=(BARE, FAST))
        + rounds(1.0, 2.0, implementations=(STOCK,))
        + [sample(BARE, 2.0)]
    )
    (group,) = journal.fold([*entries, refused(CELL, FAST)], {}).groups
    assert {name: len(timing.seconds) for name, timing in group.timings.items()} == {BARE: 2, STOCK: 2}


@pytest.mark.parametrize("comes", ["before", "after"])
@pytest.mark.parametrize(
    ("refusal", "left"),
    [
        (refused(CELL, FAST), [{BARE, STOCK}, {BARE, STOCK}]),
        (refused("layer, 8 tokens", FAST), [{BARE, STOCK}, {BARE, STOCK}]),
        (refused(f"{CELL}, {WALL}", FAST), [{BARE, STOCK}, {BARE, STOCK, FAST}]),
        (refused(f"{CELL}, {WALL}"), [None, {BARE, STOCK, FAST}]),
        (refused(CELL), [None, None]),
        (refused("layer, 8"), [{BARE, STOCK, FAST}] * 2),
        (refused(f"{CELL}, with something"), [{BARE, STOCK, FAST}] * 2),
    ],
)
def test_a_refusal_names_an_implementation_a_cell_or_a_clock(refusal, left, comes):
    entries = [one for clock in (WALL, DEVICE_TIME) for one in rounds(1.0, 2.0, clock=clock)]
    entries = [refusal, *entries] if comes == "before" else [*entries, refusal]
    groups = folded(entries)
    assert [groups.get(f"{CELL}, {clock}") for clock in (WALL, DEVICE_TIME)] == left
    assert journal.fold(entries, {}).refused == [{k: v for k, v in refusal.items() if k != "kind"}]


def test_checks_and_stages_are_kept_and_tests_that_time_are_not(tmp_path):
    test = {"kind": "test", "stage": "kernels"}
    summary = {"stage": "kernels", "state": "died", "passed": 1, "was_doing": {"test": "c"}}
    entries = [
        {**test, "name": "a", "outcome": "passed", "is_check": True},
        {**test, "name": "b", "outcome": "skipped", "why": "no GPU", "is_check": True},
        {**test, "name": "round", "outcome": "failed", "why": "x", "is_check": False},
        {"kind": "stage", "summary": summary},
    ]
    result = journal.fold(entries, {})
    assert result.checks == [
        {"stage": "kernels", "name": "a", "outcome": "passed"},
        {"stage": "kernels", "name": "b", "outcome": "skipped", "why": "no GPU"},
    ]
    assert result.stages == [summary]
    result.save(tmp_path / "run.json")
    assert Result.load(tmp_path / "run.json") == result
