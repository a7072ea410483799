"""`.ci/run` with a `make` that only notes its targets: after a failure, and when time runs out."""

import os
import re
import shutil
import subprocess

import pytest

from tests.support.imports import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")

MAKE = """#!/usr/bin/env bash
echo "$*" >> "$NOTES"
case " $RED " in *" $1 "*) exit 2 ;; esac
"""
TARGETS = re.findall(r"^(?:timed|part|in_time \d+) make (\S+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
SLOWER = TARGETS[3:]  # behind the installation, lint and `make test`


def ci_run(tmp_path, red="", seconds=0):
    """Its status, what it prints, and the targets it calls, if ``seconds`` have gone by as it begins."""
    (tmp_path / "make").write_text(MAKE)
    (tmp_path / "make").chmod(0o755)
    notes = tmp_path / "notes"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "NOTES": str(notes), "RED": red, "SECONDS": str(seconds)}
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


def test_what_there_is_no_time_for_is_named_and_has_not_failed(tmp_path):
    status, printed, called = ci_run(tmp_path, seconds=71 * 60)
    assert status == 0
    left_out = re.findall(r"^left out, for want of time: make (\S+)", printed, re.MULTILINE)
    assert called + left_out == [*TARGETS[:3], *sorted(SLOWER, key=left_out.__contains__)]
    assert "test-slow" in left_out
