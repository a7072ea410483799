"""pytest-benchmark's table, files and commands on our results."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from pytest_benchmark import cli

from bench.measure import table
from bench.results.benchmarks import entries
from bench.results.cell import Group, Timing
from bench.results.names import BARE, FAST, STOCK
from bench.results.schema import Result
from bench.suites.rounds import LOOKS
from tests.support.processes import ROOT, start

GOLDEN = Path(__file__).parents[1] / "golden" / "run.json"


def test_a_group_is_a_cell_and_a_row_an_implementation_with_its_throughput():
    seconds = {BARE: 0.5, FAST: 1.0, STOCK: 2.0}
    layer = {name: Timing([one] * 3, work={"tokens": 1024.0}) for name, one in seconds.items()}
    kernel = {"copy": Timing([1e-3] * 3, work={"bytes": 2e9})}
    groups = [Group("layer", {}, layer), Group("kernel", {}, kernel)]
    flat = [entry.as_dict(include_data=False, flat=True) for entry in entries(groups)]
    found = table.pytest_benchmark_group_stats(None, flat, "group")
    assert {group: [row["name"] for row in rows] for group, rows in found} == {
        "kernel": ["copy  2,000 GB/s"],
        "layer": [
            f"{BARE}  2,050 tokens/s",
            f"{FAST}          1,020 tokens/s",
            f"{STOCK}           512 tokens/s",
        ],
    }


def test_its_command_compares_two_of_our_files(tmp_path, monkeypatch, capsys):
    again = shutil.copy(GOLDEN, tmp_path / "again.json")
    monkeypatch.setattr(sys, "argv", ["pytest-benchmark", "compare", str(GOLDEN), str(again)])
    cli.main()
    (step,) = re.findall(r"'a step': .*?(?=\n\n)", capsys.readouterr().out, re.DOTALL)
    assert len(re.findall(rf"^{re.escape(FAST)} \(", step, re.MULTILINE)) == 2


@pytest.mark.slow
def test_its_options_work_on_a_suite_and_its_files_are_results(tmp_path):
    """A small cell twice, the later run compared with the first."""
    file = tmp_path / "run.json"
    options = [f"--benchmark-json={file}", f"--benchmark-histogram={tmp_path / 'picture'}"]
    options += [f"--benchmark-storage={tmp_path / 'saved'}", "--benchmark-autosave"]
    for compare in ([], ["--benchmark-compare", "--benchmark-compare-fail=median:10000%"]):
        selection = "MiCA-1-tokens-576x576-r16-float32 and backward"
        done = start("pytest", ROOT / "bench", "-k", selection, *options, *compare)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in (BARE, STOCK, FAST):
        row = rf"^{re.escape(name)} +[\d.,]+ tokens/s "
        assert re.search(rf"{row}\(NOW\) .* \d+ *$", done.stdout, re.MULTILINE)  # rounds
        assert re.search(rf"{row}\(0001_", done.stdout, re.MULTILINE)
    (picture,) = tmp_path.glob("picture-*.svg")
    assert BARE in picture.read_text(encoding="utf-8")
    result = Result.load(file)
    (cell,) = result.groups
    (rounds,) = {len(cell.timings[name].seconds) for name in (BARE, STOCK, FAST)}
    assert rounds in LOOKS
    assert len(cell.timings[FAST].wall) == rounds
    assert cell.timings[FAST].facts["saved_mb"] > 0
    assert result.machine["commit"]
    assert "node" not in json.loads(file.read_text())["machine_info"]  # the name of the host
