"""The journal of a run, and what a refusal takes from its result; the rest is in `tests.bench.golden`."""

import json

import pytest

from bench.results import journal
from bench.results.names import BARE, DEVICE_TIME, FAST, STOCK, WALL

CELL = "layer, 8 tokens, forward"
ALL = {BARE, STOCK, FAST}


def sample(name, clock):
    about = {"cell": CELL, "group": f"{CELL}, {clock}", "axes": {"clock": clock}, "implementation": name}
    return {"kind": "sample", **about, "seconds": 1.0, "facts": {}}


ENTRIES = [sample(name, clock) for clock in (WALL, DEVICE_TIME) for name in (BARE, STOCK, FAST)]


def test_what_is_written_is_read_except_a_truncated_line(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    monkeypatch.setenv(journal.VARIABLE, str(path))
    assert journal.read() == []
    for entry in ENTRIES:
        journal.write(**entry)
    assert journal.read() == ENTRIES
    with path.open("a") as file:
        file.write(json.dumps(ENTRIES[0])[:-9])
    assert journal.read() == journal.read(path) == ENTRIES
    monkeypatch.delenv(journal.VARIABLE)
    path.unlink()
    journal.write("doing", test="a")
    assert not path.exists()
    assert journal.read() == []


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
@pytest.mark.parametrize(
    ("group", "implementation", "left"),
    [
        (CELL, FAST, [ALL - {FAST}] * 2),
        ("layer, 8 tokens", FAST, [ALL - {FAST}] * 2),
        (f"{CELL}, {WALL}", FAST, [ALL - {FAST}, ALL]),
        (f"{CELL}, {WALL}", None, [None, ALL]),
        (CELL, None, [None, None]),
        ("layer, 8", None, [ALL, ALL]),
        ("layer, 8 tokens,", None, [ALL, ALL]),
        (f"{CELL}, with something", None, [ALL, ALL]),
    ],
)
def test_a_refusal_names_an_implementation_a_cell_or_a_clock(group, implementation, left, order):
    refusal = {"group": group, "why": "wrong"} | (
        {"implementation": implementation} if implementation else {}
    )
    result = journal.fold([{"kind": "refused", **refusal}, *ENTRIES][::order], {})
    groups = {one.name: {*one.timings} for one in result.groups}
    assert [groups.get(f"{CELL}, {clock}") for clock in (WALL, DEVICE_TIME)] == left
    assert result.refused == [refusal]
