"""`bench.run`: what a process measured is kept, whatever ends it; the next one omits the cause."""

import signal
import sys
import time

import pytest

from bench import run
from bench.results import journal
from bench.results.schema import Result

# The beginning of every process that is run here: it can measure, and knows what others before it have
SCRIPT = """
import json, os, pathlib, signal, subprocess, sys, time
from bench.results import journal

def sample(cell, implementation, seconds=1.0):
    about = {"group": cell, "implementation": implementation}
    journal.write("doing", **about)
    journal.write("sample", cell=cell, axes={}, seconds=seconds, facts={}, work={}, **about)
    journal.write("test", stage="stage", name=f"{cell}, {implementation}", outcome="passed", is_check=False)

entries = journal.read()
refused = {(entry["group"], entry.get("implementation")) for entry in entries if entry["kind"] == "refused"}
done = {(entry["cell"], entry["implementation"]) for entry in entries if entry["kind"] == "sample"}
"""
KILL, HANG = "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(60)"
# Whatever is put in place of {} stops it while it measures y in cell a
IN_A_CELL = """
sample("a", "x") if ("a", "x") not in done else None
if ("a", "y") not in refused:
    journal.write("doing", group="a", implementation="y")
    {}
sample("b", "x")
"""
IN_A_TEST = f"""
sample("a", "x") if not done else None
if not any(entry["kind"] == "test" and entry["is_check"] for entry in entries):
    journal.write("doing", stage="stage", test="test_x.py::test_y")
    {KILL}
"""
IN_PARALLEL_TESTS = f"""
if not entries:
    for name in ("hangs", "continues", "continues after it"):
        journal.write("doing", stage="stage", test=name)
        if name != "hangs":
            journal.write("test", stage="stage", name=name, outcome="passed", is_check=True)
    {HANG}
"""
DIED, SILENT = "the process died", "nothing was heard for 4 s"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(code, **limits) -> (summary, result): a run of one job, whose processes run ``code``."""
    monkeypatch.setenv(journal.VARIABLE, "")  # restored afterwards

    def start(code, **limits):
        this = run.Run(tmp_path / "results" / "run.json")
        command = [sys.executable, "-c", SCRIPT + code]
        summary = this.start(run.Job("stage", command, {}, **limits))
        return summary, Result.load(this.file)

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "state", "refused", "checks"),
    [
        ('sample("a", "x"); sample("b", "x"); sys.exit(1)', "failed", {}, {}),
        ('time.sleep(6); sample("a", "x")', "passed", {}, {}),  # it imports longer than it may be silent
        (IN_A_CELL.format(KILL), "passed", {("a", "y"): DIED}, {}),
        (IN_A_CELL.format(HANG), "passed", {("a", "y"): SILENT}, {}),
        (IN_A_TEST, "failed", {}, {"test_x.py::test_y": DIED}),
        (IN_PARALLEL_TESTS, "failed", {}, {"continues": None, "continues after it": None, "hangs": SILENT}),
    ],
    ids=["exit status", "slow imports", "killed in a cell", "hung in a cell", "killed in a test", "parallel"],
)
def test_what_stops_a_process_is_left_out_by_the_next(code, state, refused, checks, start):
    """``refused``: (cell, implementation) -> why; ``checks``: name of a test -> why it failed, or None."""
    summary, result = start(code, silence=4.0)
    assert summary["state"] == state
    assert result.stages == [summary]
    assert {(entry["group"], entry["implementation"]): entry["why"] for entry in result.refused} == refused
    assert {check["name"]: check.get("why") for check in result.checks} == checks
    assert summary.get("first_failed", []) == [name for name, why in checks.items() if why]
    assert all([*group.timings] == ["x"] and group.timings["x"].seconds == [1.0] for group in result.groups)
    assert len(result.groups) == code.count('sample("')  # each call has a cell of its own


def test_a_process_that_keeps_dying_is_given_up(start):
    summary, result = start(f'sample("a", "x"); {KILL}')
    assert summary["state"] == "died"
    assert len(result.refused) <= run.STARTS  # it is not restarted for ever
    assert result.stages[0]["was_doing"] == {"group": "a", "implementation": "x"}


@pytest.mark.slow
def test_over_time_it_ends_with_its_children(start, tmp_path):
    """A child that outlived the limit of 6 s would leave a file 15 s after the start at the latest."""
    file, began = tmp_path / "child", time.monotonic()
    child = f"import time, pathlib; time.sleep(9); pathlib.Path({str(file)!r}).touch()"
    code = f"sample('a', 'x'); subprocess.Popen([sys.executable, '-c', {child!r}]); {HANG}"
    summary, result = start(code, seconds=6.0)
    assert summary["state"] == "over time"
    assert result.groups[0].timings["x"].seconds == [1.0]
    time.sleep(max(0.0, 16.5 - (time.monotonic() - began)))
    assert not file.exists()


def test_a_run_that_is_told_to_end_keeps_what_it_has_and_leaves_no_process(start, monkeypatch, tmp_path):
    watched = []

    def watch(this, process, *limits):
        while not any(entry["kind"] == "sample" for entry in journal.read()):
            time.sleep(0.05)
        watched.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "_watch", watch)
    with pytest.raises(KeyboardInterrupt):
        start(f"sample('a', 'x'); {HANG}")
    result = Result.load(tmp_path / "results" / "run.json")
    assert result.stages[0]["state"] == run.CUT_OFF
    assert result.stages[0]["was_doing"] == {"group": "a", "implementation": "x"}
    assert result.groups[0].timings["x"].seconds == [1.0]
    assert watched[0].returncode == -signal.SIGKILL
