"""Suites in separate processes, as a run starts them."""

import pytest

from bench import run
from bench.results import journal
from tests.support.processes import start


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """measured(files, selection, operator=None, **environment) -> (exit status, Result, output)."""

    def measured(files, selection="", operator=None, **environment):
        path = tmp_path_factory.mktemp("run") / "journal.jsonl"
        settings = {"MICA_BENCH_SIZE": "quick", journal.VARIABLE: str(path), **environment}
        if operator:
            settings |= {"MICA_TEST_OPERATOR": operator, "plugin": "tests.support.broken_operator"}
        command = run.suite(files, selection)
        done = start(*command[command.index("-m") + 1 :], **settings)
        return done.returncode, journal.fold(journal.read(path), {}), done.stdout + done.stderr

    return measured
