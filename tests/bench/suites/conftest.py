"""Suites in processes of their own, as a run starts them."""

import os
import subprocess

import pytest

from bench import run
from bench.measure.machine import ROOT
from bench.results import journal


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """measured(files, selection, operator=None, **environment) -> (exit status, Result, output)."""

    def measured(files, selection="", operator=None, **environment):
        path = tmp_path_factory.mktemp("run") / "journal.jsonl"
        # not those of this test run: in a worker of xdist, pytest-benchmark times nothing
        outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        outside.pop("TRITON_INTERPRET", None)
        if operator:
            environment["MICA_TEST_OPERATOR"] = operator
            environment["PYTEST_ADDOPTS"] = "-p tests.support.broken_operator"
        environment = {
            **outside,
            "PYTHONPATH": str(ROOT),
            "MICA_BENCH_SIZE": "quick",
            journal.VARIABLE: str(path),
            **environment,
        }
        done = subprocess.run(
            run.suite(files, selection), cwd=ROOT, env=environment, capture_output=True, text=True
        )
        return done.returncode, journal.fold(journal.read(path), {}), done.stdout + done.stderr

    return measured
