"""Implementations that are built and checked one by one, and what is refused."""

import pytest

from bench.results import journal
from bench.suites import harness


@pytest.fixture(autouse=True)
def written(monkeypatch, tmp_path):
    """The journal's entries so far."""
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path / "run.jsonl"))
    monkeypatch.setattr(harness, "refusals", {})
    return journal.read


def wrong():
    raise AssertionError("the relative error of y is 0.1\nand more")


def raising():
    raise ValueError("no such shape")


def test_an_implementation_that_is_wrong_or_raises_is_refused_alone(written):
    builds = {"a": lambda: 1, "wrong": wrong, "raising": raising, "b": lambda: 2}
    assert harness.build_all("cell", builds, lambda name: builds[name]()) == {"a": 1, "b": 2}
    assert harness.refusals == {
        ("cell", "wrong"): "the relative error of y is 0.1",
        ("cell", "raising"): "ValueError: no such shape",
    }
    refused = [(one["group"], one["implementation"]) for one in written() if one["kind"] == "refused"]
    assert refused == [("cell", "wrong"), ("cell", "raising")]
    assert [one["implementation"] for one in written() if one["kind"] == "doing"] == [
        "a",
        "wrong",
        "raising",
        "b",
    ]


def test_what_was_refused_is_not_built_again():
    harness.refuse("cell", "the process died", "a")
    builds = {"a": pytest.fail, "b": lambda: 2}
    assert harness.build_all("cell", builds, lambda name: builds[name]()) == {"b": 2}


@pytest.mark.parametrize(
    ("group", "implementation", "refused"),
    [
        ("cell", "a", True),
        ("cell, backward", "a", True),
        ("cell", "b", False),
        ("cell of another kind", "a", False),
        ("whole", "b", True),
        ("whole, forward", "a", True),
    ],
)
def test_what_was_refused_in_a_cell_is_refused_in_each_of_its_passes(group, implementation, refused):
    harness.refuse("cell", "wrong", "a")
    harness.refuse("whole", "no memory")
    assert (harness.why_refused(group, implementation) is not None) == refused


@pytest.mark.parametrize(
    ("device", "size", "expected"),
    [("cpu", "quick", 1), ("cpu", "default", 2), ("cpu", "full", 3), ("cuda", "full", 4), ("cpu", "dry", 5)],
)
def test_a_size_takes_its_own_value(monkeypatch, device, size, expected):
    monkeypatch.setattr(harness, "DEVICE", device)
    monkeypatch.setattr(harness, "SIZE", size)
    monkeypatch.setattr(harness, "IS_DRY", size == "dry")
    assert harness.pick(quick=1, default=2, full=3, cuda=4, dry=5) == expected


def test_a_size_without_its_own_value_falls_back(monkeypatch):
    monkeypatch.setattr(harness, "SIZE", "full")
    assert harness.pick(quick=1, default=2) == 2
    monkeypatch.setattr(harness, "IS_DRY", True)
    assert harness.pick(quick=1, default=2, cuda=4) == 1
    assert harness.pick(default=2, cuda=4) == 2
