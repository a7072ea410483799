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
from tests.support.processes import ROOT, start

GOLDEN = Path(__file__).parents[1] / "golden" / "run.json"


def rows_of(result):
    """group -> the names of its rows, as pytest-benchmark's table shows them."""
    flat = [entry.as_dict(include_data=False, flat=True) for entry in entries(result.groups)]
    groups = table.pytest_benchmark_group_stats(None, flat, "group")
    return {group: [row["name"] for row in rows] for group, rows in groups}


def test_a_group_is_a_cell_and_a_row_an_implementation_with_its_throughput():
    layer = Group("layer", {"tokens": 1024})
    for name, seconds in {BARE: 0.5, FAST: 1.0, STOCK: 2.0}.items():
        layer.timings[name] = Timing([seconds] * 3, work={"tokens": 1024.0})
    kernel = Group("kernel", {"tokens": 8})
    kernel.timings["copy"] = Timing([1e-3] * 3, work={"bytes": 2e9, "seconds at the device's peak": 5e-4})
    idle = Group("nothing named", {}, {FAST: Timing([1.0, 2.0])})
    assert rows_of(Result({}, [layer, kernel, idle])) == {
        "kernel": ["copy  2,000 GB/s, 50 % of the peak"],
        "layer": [
            f"{BARE}  2,050 tokens/s",
            f"{FAST}          1,020 tokens/s",
            f"{STOCK}           512 tokens/s",
        ],
        "nothing named": [FAST],
    }


def compared(monkeypatch, capsys, *files):
    monkeypatch.setattr(sys, "argv", ["pytest-benchmark", "compare", *map(str, files)])
    cli.main()
    return capsys.readouterr().out


def test_its_command_compares_two_of_our_files(tmp_path, monkeypatch, capsys):
    again = shutil.copy(GOLDEN, tmp_path / "again.json")
    text = compared(monkeypatch, capsys, GOLDEN, again)
    (step,) = re.findall(r"'a step': .*?(?=\n\n)", text, re.DOTALL)
    assert len(re.findall(rf"^{re.escape(FAST)} \(", step, re.MULTILINE)) == 2


@pytest.mark.slow
def test_its_options_work_on_a_suite_and_its_files_are_results(tmp_path, monkeypatch, capsys):
    """Two runs of a small cell, the later compared with the first."""
    options = [f"--benchmark-storage={tmp_path / 'saved'}", "--benchmark-autosave"]
    for file in ("1.json", "2.json"):
        files = [f"--benchmark-json={tmp_path / file}", f"--benchmark-histogram={tmp_path / 'picture'}"]
        selection = "1x576x576-r16-float32 and backward"
        done = start("pytest", ROOT / "bench", "-k", selection, *files, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        options += ["--benchmark-compare", "--benchmark-compare-fail=median:10000%"]
    for name in (BARE, STOCK, FAST):
        (row,) = re.findall(rf"^{re.escape(name)} +[\d.,]+ tokens/s \(NOW\) .*", done.stdout, re.MULTILINE)
        assert row.split()[-1] == "5"  # rounds
        assert re.search(rf"^{re.escape(name)} +[\d.,]+ tokens/s \(0001_", done.stdout, re.MULTILINE)
    (picture,) = tmp_path.glob("picture-*.svg")
    assert BARE in picture.read_text(encoding="utf-8")
    saved = [*tmp_path.glob("saved/*/*.json")]
    assert len(saved) == 2
    text = compared(monkeypatch, capsys, tmp_path / "1.json", tmp_path / "2.json")
    assert len(re.findall(rf"^{re.escape(FAST)} \(", text, re.MULTILINE)) == 2
    for file in (tmp_path / "1.json", *saved):
        result = Result.load(file)
        (cell,) = result.groups
        assert {BARE, STOCK, FAST} <= cell.timings.keys()
        assert {len(timing.seconds) for timing in cell.timings.values()} == {5}
        assert cell.timings[FAST].facts["saved_mb"] > 0
        assert result.machine["commit"]
        assert "node" not in json.loads(file.read_text())["machine_info"]  # the name of the host
