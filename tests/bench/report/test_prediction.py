"""Prediction beside measurement: every modelled number is called so, and what is off is counted."""

import pytest

from bench.report.markdown import DRY, report
from bench.report.prediction import verdict
from bench.results.names import BARE, DEVICE_TIME
from tests.support.gpu_results import layers, result

CELL = "layer, 8192 tokens, forward"  # in which the bare layer takes 1 ms


def run(device, seconds):
    """A run for which the model has said these seconds."""
    made = result(*layers(1.25e-3), device=device)
    row = {"group": f"{CELL}, {DEVICE_TIME}", "implementation": BARE, "device": "a card"}
    made.predictions = [{**row, "seconds": seconds, "bytes": 2e6, "launches": 3}]
    return made


@pytest.mark.parametrize(("ratio", "is_off"), [(0.79, True), (0.81, False), (1.19, False), (1.21, True)])
def test_rows_that_are_off_by_more_than_a_fifth_are_counted(ratio, is_off):
    text = verdict(run("a card", 1e-3 / ratio))
    assert text == f"Rows modelled: 1, measured: 1, off by more than 20 %: {int(is_off)}."


def test_a_dry_run_has_columns_and_no_verdict():
    text = report(run("dry run", 1e-9))
    assert DRY in text
    assert "Modelled for a card before the run" in text
    assert "off by" not in text
