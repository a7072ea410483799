"""``python -m bench`` on one small cell: a result, a report, and what a slow or wrong operator does."""

import re

import pytest

from bench.report.compare import main as compare
from bench.results.names import BACKWARD, BARE, FAST, FORWARD, NO_GRADIENT, STOCK
from bench.results.schema import Result
from tests.support.dry_run import CELL
from tests.support.processes import start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name, operator=None) -> (exit status, result file, output)."""
    folder = tmp_path_factory.mktemp("results")

    def run(name, operator=None, which=CELL):
        settings = {}
        if operator:
            settings = {"MICA_TEST_OPERATOR": operator, "plugin": "tests.support.broken_operator"}
        done = start("bench", "--quick", "-k", which, "--name", name, "--output", folder, **settings)
        return done.returncode, folder / f"{name}.json", done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def usual(run):
    code, file, output = run("usual")
    assert code == 0, output
    return file, output


def test_it_writes_a_result_and_its_report(usual):
    file, output = usual
    result = Result.load(file)
    assert [group.axes["pass"] for group in result.groups] == [FORWARD, BACKWARD, NO_GRADIENT]
    for group in result.groups:
        assert {BARE, STOCK, FAST} <= group.timings.keys()
        assert {len(timing.seconds) for timing in group.timings.values()} == {3}
    assert not result.refused
    assert result.machine["size"] == "quick"
    text = file.with_suffix(".md").read_text()
    assert text in output
    assert re.search(rf"^\|.* {re.escape(STOCK)} +\| [\d.]+ +\| [\d,.]+ +\|", text, re.MULTILINE)
    assert "| tokens/s " in text


def test_a_slow_operator_is_a_regression(run, usual):
    code, slow, output = run("slow", "slow")
    assert code == 0, output
    assert compare([str(usual[0]), str(slow)]) == 1
    assert compare([str(slow), str(usual[0])]) == 0  # faster


def test_nothing_to_time(run):
    code, file, output = run("nothing", which="no_such_benchmark")
    assert code != 0
    assert "nothing was timed" in output
    assert not file.exists()
