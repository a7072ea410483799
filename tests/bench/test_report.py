"""The overhead column of the benchmark report."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # `bench` is run from a checkout, never installed
report = import_module("bench.report")

BARE = {"seconds": [1.0, 2.0, 1.0]}
LORA = {"seconds": [2.0, 2.1, 3.0]}  # overheads 1, 0.1, 2: the median is 1
FAST = {"seconds": [1.5, 2.25, 1.0]}  # 0.5, 0.25, 0


def test_overhead_is_of_one_round_over_the_median_of_the_baselines():
    assert report.overhead(FAST, LORA, BARE) == "0.250 (0.00–0.50)"
    assert report.overhead(BARE, LORA, BARE) == "0.000 (0.00–0.00)"


def test_no_overhead_over_a_baseline_that_has_none():
    assert report.overhead(FAST, BARE, BARE) == ""


def test_the_table_has_the_column_where_both_are_there():
    rivals = {report.BARE: BARE, "PEFT LoRA": LORA, "mica.fast": FAST}
    header, *_, last = report.table("step", rivals).splitlines()[2:]
    assert header.split(" | ")[-1] == "overhead ÷ that of PEFT LoRA"
    assert last.split(" | ")[-1] == "0.250 (0.00–0.50)"
    del rivals[report.BARE]
    assert "overhead" not in report.table("step", rivals)
