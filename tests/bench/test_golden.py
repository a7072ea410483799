"""From a journal to its result and its report: the files in `golden`.

Times are made up, so that a page's figures can be worked out by hand. After a change of the report
``python -m bench.report tests/bench/golden/run.jsonl`` writes the new result and page.
"""

from pathlib import Path

import pytest

from bench.report import __main__ as command
from bench.report.markdown import quietness, report
from bench.results.cell import Group, Timing
from bench.results.names import BARE, FAST, STOCK
from bench.results.schema import Result

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return (GOLDEN / name).read_text(encoding="utf-8")


@pytest.fixture
def journal(tmp_path):
    """A copy of the journal, beside a result that knows the machine only."""
    file = tmp_path / "run.jsonl"
    file.write_text(golden("run.jsonl"), encoding="utf-8")
    machine = Result.load(GOLDEN / "run.json").machine
    Result(machine, []).save(file.with_suffix(".json"))
    return file


def test_a_journal_becomes_a_result_and_its_report(journal, capsys):
    """Written as it was read, and its passes are summed once."""
    command.main([str(journal)])
    written = journal.with_suffix(".json")
    assert written.read_text(encoding="utf-8") == golden("run.json")
    assert journal.with_suffix(".md").read_text(encoding="utf-8") == golden("run.md")
    assert capsys.readouterr().out == golden("run.md")
    result = Result.load(written)
    result.save(written)
    assert written.read_text(encoding="utf-8") == golden("run.json")
    summed = result.with_both()
    assert summed.with_both() == summed


def test_an_interrupted_run_does_not_know_its_machine(journal):
    journal.with_suffix(".json").unlink()
    text = command.write(journal)
    unknown = "The machine is unknown, and so is whether these times are measurements."
    assert text.splitlines()[2] == unknown
    assert text.partition("## Layer")[2] == golden("run.md").partition("## Layer")[2]


@pytest.mark.parametrize("implementation", [BARE, STOCK, FAST])
def test_an_implementation_without_a_number_leaves_the_others(implementation):
    result = Result.load(GOLDEN / "run.json")
    for group in result.groups:
        group.timings.pop(implementation, None)
    text = report(result)
    assert f"÷ {implementation} " not in text.partition("## Layer")[2]
    assert f"| {implementation} " not in text
    assert ("Nothing was compared with mica.fast." in text) == (implementation == FAST)


def cell(name, **walls):
    """Each implementation takes 1 s of CPU time, and so many by the clock."""
    return Group(name, {}, {which: Timing([1.0], wall=[wall]) for which, wall in walls.items()})


def test_a_busy_machine_is_seen():
    cells = [cell("a", x=1.0, y=1.5), cell("b", x=1.0), cell("c", x=3.0), Group("by the clock", {})]
    text = "How quiet the machine was: wall ÷ CPU was 1.50 in the median cell, and 3.00 in c."
    assert quietness(cells) == text
