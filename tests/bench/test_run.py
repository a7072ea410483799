"""`bench.run`: what a process measured is kept, whatever ends it; the next one omits the cause."""

import json
import os
import sys
import time

import pytest

from bench import run
from bench.results import journal
from bench.results.schema import Result

SCRIPT = """
import os, signal, sys, time
from bench.results import journal

def sample(cell, implementation, seconds=1.0):
    journal.write("doing", group=cell, implementation=implementation)
    about = {"cell": cell, "group": cell, "implementation": implementation}
    journal.write("sample", seconds=seconds, axes={"cell": cell}, facts={}, **about)
    journal.write("test", stage="stage", name=f"{cell}, {implementation}", outcome="passed", is_check=False)

refused = {(one["group"], one.get("implementation")) for one in journal.read() if one["kind"] == "refused"}
done = {(one["cell"], one["implementation"]) for one in journal.read() if one["kind"] == "sample"}
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(code, **limits) -> (summary, result): a run of one process, which runs ``code``."""
    monkeypatch.setenv(journal.VARIABLE, "")  # restored afterwards

    def start(code, **limits):
        this = run.Run(tmp_path / "results" / "run.json")
        summary = this.start(run.Job("stage", [sys.executable, "-c", SCRIPT + code], {}, **limits))
        return summary, Result.load(this.file)

    return start


def test_a_process_that_ends(start):
    summary, result = start('sample("a", "x"); sample("a", "y"); sys.exit(1)')
    assert summary["state"] == "failed"
    assert result.stages == [summary]
    assert [*result.groups[0].timings] == ["x", "y"]
    assert not result.refused


FAULTS = {
    "os.kill(os.getpid(), signal.SIGKILL)": "the process died",
    "time.sleep(60)": "nothing was heard for 4 s",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stops_a_process_is_left_out_by_the_next(start, fault):
    code = f"""
sample("a", "x") if ("a", "x") not in done else None
if ("a", "y") not in refused:
    journal.write("doing", group="a", implementation="y")
    {fault}
sample("b", "x")
"""
    summary, result = start(code, silence=4.0)
    assert summary["state"] == "passed"
    assert result.refused == [{"group": "a", "implementation": "y", "why": FAULTS[fault]}]
    assert {group.name: [*group.timings] for group in result.groups} == {"a": ["x"], "b": ["x"]}
    assert len(result.groups[0].timings["x"].seconds) == 1


def test_one_that_keeps_dying_is_given_up(start):
    summary, result = start('sample("a", "x"); os.kill(os.getpid(), signal.SIGKILL)')
    assert summary["state"] == "died"
    # between two tests: nothing is blamed, and it is not restarted for ever
    assert len(result.refused) <= run.STARTS
    assert result.stages[0]["was_doing"] == {"group": "a", "implementation": "x"}


def test_over_time(start):
    summary, result = start('sample("a", "x"); time.sleep(60)', seconds=6.0)
    assert summary["state"] == "over time"
    assert summary["seconds"] < 30
    assert result.groups[0].timings["x"].seconds == [1.0]


def test_its_children_end_with_it(start, tmp_path):
    note = tmp_path / "child"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(note)!r}).touch()"
    start(
        f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)", seconds=1.0
    )
    time.sleep(4.5)
    assert not note.exists()


def test_a_test_that_stops_a_process_has_failed(start):
    code = """
sample("a", "x") if not done else None
if not any(one["kind"] == "test" and one["is_check"] for one in journal.read()):
    journal.write("doing", stage="stage", test="test_x.py::test_y")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    summary, result = start(code)
    assert summary["state"] == "failed"
    assert summary["first_failed"] == ["test_x.py::test_y"]
    assert [(one["outcome"], one["why"]) for one in result.checks] == [("failed", "the process died")]


def test_of_parallel_tests_the_one_that_has_not_ended_is_blamed(start):
    code = """
if not journal.read():
    for name in ("hangs", "continues", "continues after it"):
        journal.write("doing", stage="stage", test=name)
        if name != "hangs":
            journal.write("test", stage="stage", name=name, outcome="passed", is_check=True)
    time.sleep(60)
"""
    _, result = start(code, silence=4.0)
    assert {one["name"]: one["outcome"] for one in result.checks} == {
        "continues": "passed",
        "continues after it": "passed",
        "hangs": "failed",
    }


def test_results_are_written_while_it_runs(start, tmp_path):
    file = tmp_path / "results" / "run.json"
    code = f"""
import json, pathlib
sample("a", "x")
deadline = time.monotonic() + 20
while not pathlib.Path({str(file)!r}).exists() and time.monotonic() < deadline:
    time.sleep(0.1)
    sample("a", "x")
written = json.loads(pathlib.Path({str(file)!r}).read_text())
assert written["groups"][0]["timings"]["x"]["seconds"]
"""
    assert start(code)[0]["state"] == "passed"


def test_a_machine_without_git(monkeypatch):
    from bench.measure import machine

    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("MICA_BENCH_COMMIT", "abc")
    facts = machine.facts()
    assert facts["commit"] == "abc"
    assert json.dumps(facts)


def test_results_go_where_out_says(monkeypatch, tmp_path):
    from bench.measure.machine import output

    monkeypatch.setenv("OUT", str(tmp_path))
    assert output() == tmp_path
    monkeypatch.delenv("OUT")
    assert output().parts[-3:-1] == ("bench", "results")
    assert os.sep not in output().name
