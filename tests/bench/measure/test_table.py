"""pytest-benchmark's table, files and commands on our results."""

import re
import shutil
import sys
from pathlib import Path

from pytest_benchmark import cli

from bench.measure import table
from bench.results.benchmarks import entries
from bench.results.cell import Group, Timing
from bench.results.names import BARE, FAST, STOCK

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
