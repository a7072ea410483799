"""``python -m bench`` on one small cell: a result, a report, and what a slow operator does to it."""

import re

import pytest

from bench.report.__main__ import write
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
        done = start("bench", "layer", "-k", which, "--name", name, "--output", folder, **settings)
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
        assert {len(timing.seconds) for timing in group.timings.values()} == {5}
    assert not result.refused
    assert result.machine["size"] == "default"
    text = file.with_suffix(".md").read_text()
    assert text in output
    assert re.search(rf"^\|.* {re.escape(STOCK)} +\| [\d.]+ +\| [\d,.]+ +\|", text, re.MULTILINE)
    assert "| tokens/s " in text


def test_a_slow_operator_has_other_ratios(run, usual):
    code, slow, output = run("slow", "slow")
    assert code == 0, output
    text = write(slow, with_pictures=False, old=usual[0])
    _, _, changed = text.partition("## Changed")
    assert re.search(rf"^\|.*\| {re.escape(FAST)} +\| ÷ {re.escape(STOCK)} +\|", changed, re.MULTILINE)


def test_a_suite_that_is_not_there_is_refused():
    done = start("bench", "layers")
    assert done.returncode == 2
    assert "there is no suite 'layers'" in done.stderr


def test_nothing_to_time(run):
    code, file, output = run("nothing", which="no_such_benchmark")
    assert code != 0
    assert "nothing was timed" in output
    assert not file.exists()
