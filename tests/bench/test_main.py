"""``python -m bench`` on one small cell: a result and a report."""

import re

import pytest

from bench.results.names import BACKWARD, BARE, FAST, FORWARD, NO_GRADIENT, STOCK
from bench.results.schema import Result
from bench.suites.rounds import LOOKS
from tests.support.dry_run import CELL
from tests.support.processes import start

pytestmark = pytest.mark.slow


def run(folder, which=CELL):
    done = start("bench", "layer", "-k", which, "--name", "run", "--output", folder)
    return done.returncode, folder / "run.json", done.stdout + done.stderr


def test_it_writes_a_result_and_its_report(tmp_path):
    code, file, output = run(tmp_path)
    assert code == 0, output
    result = Result.load(file)
    assert [group.axes["pass"] for group in result.groups] == [FORWARD, BACKWARD, NO_GRADIENT]
    for group in result.groups:
        assert {BARE, STOCK, FAST} <= group.timings.keys()
        (rounds,) = {len(timing.seconds) for timing in group.timings.values()}
        assert rounds in LOOKS
    text = file.with_suffix(".md").read_text()
    assert text in output
    assert "How quiet the machine was: wall ÷ CPU was " in text
    assert re.search(rf"^\|.* {re.escape(STOCK)} +\| [\d.]+ +\| [\d,.]+ +\|", text, re.MULTILINE)


def test_nothing_to_time(tmp_path):
    code, file, output = run(tmp_path, "no_such_benchmark")
    assert code == 1
    assert "nothing was timed" in output
    assert not file.exists()
