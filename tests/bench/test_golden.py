"""From a journal to its result and its report: the files in `golden`.

Times are made up, so that a page's figures can be worked out by hand. After a change of the report
``python -m bench.report --no-pictures tests/bench/golden/cpu.jsonl`` writes the new result and page, likewise
of gpu and dry.
"""

import copy
import re
from pathlib import Path

import pytest

from bench.report import __main__ as command
from bench.report.markdown import changes, report
from bench.report.targets import KERNELS
from bench.report.words import ratios
from bench.results.names import BARE, FAST, STOCK
from bench.results.schema import Result

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return (GOLDEN / name).read_text(encoding="utf-8")


@pytest.fixture
def journal(tmp_path):
    """journal(name, machine) -> a copy of the journal, with or without a result that knows the machine."""

    def journal(name, machine=True):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(golden(file.name), encoding="utf-8")
        if machine:
            Result(Result.load(GOLDEN / f"{name}.json").machine, []).save(file.with_suffix(".json"))
        return file

    return journal


@pytest.mark.parametrize("name", ["cpu", "gpu", "dry"])
def test_a_journal_becomes_a_result_and_its_report(name, journal, capsys):
    """Written as it was read, and its passes are summed once."""
    file = journal(name)
    command.main([str(file), "--no-pictures"])
    written = file.with_suffix(".json")
    assert written.read_text(encoding="utf-8") == golden(f"{name}.json")
    assert file.with_suffix(".md").read_text(encoding="utf-8") == golden(f"{name}.md")
    assert capsys.readouterr().out == golden(f"{name}.md")
    result = Result.load(written)
    summed = result.with_both()
    assert summed.with_both() == summed
    for groups in (result.groups, []):
        result.groups = groups
        result.save(written)
        assert Result.load(written) == result
    assert {path.suffix for path in file.parent.iterdir()} == {".jsonl", ".json", ".md"}


def test_an_interrupted_run_does_not_know_its_machine(journal):
    lines, known = (
        command.write(journal("cpu", machine), with_pictures=False).splitlines() for machine in (False, True)
    )
    assert lines[2] == "The machine is unknown, and so is whether these times are measurements."
    assert [*lines[:2], *lines[3:]] == [*known[:2], *known[3:]]


def test_a_run_that_measured_nothing_says_so():
    text = report(Result({"device": "a GPU"}, []))
    rows = [
        line for line in text.splitlines() if line.startswith(("| a layer", *(f"| {k}:" for k in KERNELS)))
    ]
    assert len(rows) == 6 + 4
    assert all(line.split("|")[4].strip() == "not measured" for line in rows)
    assert "mica.fast was compared with nothing." in text


@pytest.mark.parametrize("name", ["cpu", "gpu"])
@pytest.mark.parametrize("implementation", [BARE, STOCK, FAST])
def test_an_implementation_without_a_number_leaves_the_others(name, implementation):
    result = Result.load(GOLDEN / f"{name}.json")
    for group in result.groups:
        group.timings.pop(implementation, None)
    text = report(result)
    assert f"÷ {implementation} " not in text.partition("## Layer")[2]
    assert f"| {implementation} |" not in re.sub(" +", " ", text)
    if implementation == FAST:
        assert "mica.fast was compared with nothing." in text


def test_pictures_are_linked(journal):
    file = journal("cpu")
    markdown = command.write(file)
    assert file.with_suffix(".md").read_text(encoding="utf-8") == markdown
    pictures = [file.with_name(f"cpu-{what}.png") for what in ("against-stock", "throughput")]
    assert sorted(file.parent.glob("*.png")) == pictures
    for picture in pictures:
        assert f"]({picture.name})\n" in markdown


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([str(tmp_path / "run.jsonl")])
    assert capsys.readouterr().err.endswith(f"error: there is no {tmp_path / 'run.jsonl'}\n")


def test_ratios_that_changed_since_another_run_are_listed():
    """Where the intervals overlap, chance may have moved them; what only one run has is not compared."""
    old = Result.load(GOLDEN / "cpu.json").groups
    count = sum(len(ratios(group, name)) for group in old for name in group.timings)
    assert changes(old, old) == f"{count} of {count} ratios agree: their intervals overlap."
    new = copy.deepcopy(old)
    (loading,) = (group for group in new if group.axes.get("suite") == "loading")
    fast = loading.timings[FAST]
    fast.seconds = [2 * seconds for seconds in fast.seconds]
    *head, row, _, agreeing = changes(old, new[1:]).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(head) == 2
    assert cells[:3] == [loading.name, FAST, f"÷ {STOCK}"]
    assert cells[-1] == "2.00"
    less = count - sum(len(ratios(old[0], name)) for name in old[0].timings)
    assert agreeing == f"{less - 1} of {less} ratios agree: their intervals overlap."
