"""`.ci/run` with a `make` that only notes its targets: after a failure, and when time runs out."""

import os
import re
import shutil
import subprocess
from unittest.mock import MagicMock

import pytest

from tests.support.imports import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")

MAKE = """#!/usr/bin/env bash
echo "$*" >> "$NOTES"
[ "$1" != "$LATE" ] || printf 'one\ntwo\n' >> "$MICA_TEST_LEFT_OUT"
case " $RED " in *" $1 "*) exit 2 ;; esac
"""
TARGETS = re.findall(r"^(?:timed|part|in_time \d+) make (\S+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
SLOWER = TARGETS[3:]  # behind the installation, lint and `make test`


def ci_run(tmp_path, red="", seconds=0, late=""):
    """Its status, what it prints, and the targets it calls, if ``seconds`` have gone by as it begins.

    ``late``: the target that leaves out two tests.
    """
    (tmp_path / "make").write_text(MAKE)
    (tmp_path / "make").chmod(0o755)
    notes = tmp_path / "notes"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    told = {"NOTES": str(notes), "RED": red, "SECONDS": str(seconds), "LATE": late}
    environment = {**os.environ, "PATH": path, **told}
    done = subprocess.run(["bash", ROOT / ".ci/run"], env=environment, capture_output=True, text=True)
    assert not done.stderr
    called = [line.split()[0] for line in notes.read_text().splitlines()]
    return done.returncode, done.stdout, called


def test_it_runs_all_parts_and_reports_their_times(tmp_path):
    status, printed, called = ci_run(tmp_path)
    assert status == 0
    assert called == TARGETS
    assert TARGETS[:3] == [".venv/.installed", "lint", "test"]
    assert len(SLOWER) >= 6
    assert re.findall(r"^ +\d+ s  make (\S+)", printed, re.MULTILINE) == TARGETS
    assert "FAILED" not in printed


@pytest.mark.parametrize("red", [TARGETS[0], TARGETS[1]])
def test_without_the_installation_or_with_a_red_lint_it_ends_at_once(red, tmp_path):
    status, _, called = ci_run(tmp_path, red)
    assert status != 0
    assert called[-1] == red


def test_it_goes_on_after_a_failure_and_names_all_of_them(tmp_path):
    red = ["test", SLOWER[0], SLOWER[-1]]
    status, printed, called = ci_run(tmp_path, " ".join(red))
    assert status == 1
    assert called == TARGETS
    assert re.findall(r"^FAILED: make (\S+)", printed, re.MULTILINE) == red


LEFT_OUT = 75  # neither green nor a failure


def test_what_there_is_no_time_for_is_named_and_not_green(tmp_path):
    status, printed, called = ci_run(tmp_path, seconds=71 * 60)
    assert status == LEFT_OUT
    left_out = re.findall(r"^left out, for want of time: make (\S+)", printed, re.MULTILINE)
    assert called + left_out == [*TARGETS[:3], *sorted(SLOWER, key=left_out.__contains__)]
    assert "test-slow" in left_out


@pytest.mark.parametrize(("red", "expected"), [("", LEFT_OUT), ("conformance", 1)])
def test_single_tests_that_were_left_out_are_counted_and_not_green(red, expected, tmp_path):
    status, printed, called = ci_run(tmp_path, red, late="test-slow")
    assert status == expected
    assert called == TARGETS
    assert "left out, for want of time: 2 tests\n" in printed


def test_a_test_that_begins_after_the_deadline_is_skipped_and_noted(request, monkeypatch, tmp_path):
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setattr(conftest, "LEFT_OUT", tmp_path / "left out")
    item = MagicMock(nodeid="tests/test_one.py::test_one")
    assert conftest.pytest_runtest_protocol(item, None) is None
    monkeypatch.setattr(conftest, "DEADLINE", 1)
    assert conftest.pytest_runtest_protocol(item, None) is True
    assert item.ihook.pytest_runtest_logreport.call_args.kwargs["report"].skipped
    assert (tmp_path / "left out").read_text() == "tests/test_one.py::test_one\n"
