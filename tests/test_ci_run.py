"""`.ci/run` with a `make` that only notes its targets: in each rhythm, and after a failure."""

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
BEFORE = [".venv/.installed", "lint"]


def ci_run(tmp_path, *rhythm, red=""):
    """Its status, what it prints, and the targets it calls."""
    (tmp_path / "make").write_text(MAKE)
    (tmp_path / "make").chmod(0o755)
    notes = tmp_path / "notes"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "NOTES": str(notes), "RED": red}
    command = ["bash", ROOT / ".ci/run", *rhythm]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.stderr
    called = [line.split()[0] for line in notes.read_text().splitlines()]
    return done.returncode, done.stdout, called


def test_every_check_of_the_makefile_has_its_rhythm():
    """But what a test of another name contains, and what is no check."""
    targets = set(re.findall(r"^([a-z-]+): \$\(READY\)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    run = set(re.findall(r"make ([a-z-]+)", (ROOT / ".ci/run").read_text()))
    others = {"demo", "test-all", "bench", "gpu-dry-run"}
    assert targets - run == others
    assert run <= targets


def test_it_goes_on_after_a_failure_and_names_all_of_them(tmp_path):
    red = ["test-full", "conformance"]
    status, printed, called = ci_run(tmp_path, "nightly", red=" ".join(red))
    assert status == 1
    assert called[-1] == "mutants"
    assert re.findall(r"^FAILED: make (\S+)", printed, re.MULTILINE) == red
