"""Prediction beside measurement: every modelled number is called so, and what is off is named."""

import pytest

from bench.report.markdown import DRY, report
from bench.report.prediction import TOLERANCE, verdict
from bench.results.names import BARE, DEVICE_TIME, FAST
from tests.support.gpu_results import layers, result

CELL = "layer, 8192 tokens, forward"  # in which bare and ours take 1 and 1.25 ms


def run(device, **modelled):
    """A run for which the model has said these seconds of the bare layer and ours."""
    made = result(*layers(1.25e-3), device=device)
    row = {"group": f"{CELL}, {DEVICE_TIME}", "device": "a card", "bytes": 2e6, "launches": 3}
    for implementation, seconds in modelled.items():
        made.predictions.append({**row, "implementation": implementation, "seconds": seconds})
    return made


@pytest.mark.parametrize(
    ("seconds", "is_off"),
    [
        (1e-3, False),
        (1e-3 / (1 + TOLERANCE) * 1.01, False),
        (1e-3 / (1 + TOLERANCE) * 0.99, True),
        (1e-3 / (1 - TOLERANCE) * 0.99, False),
        (1e-3 / (1 - TOLERANCE) * 1.01, True),
    ],
)
def test_rows_that_are_off_are_named(seconds, is_off):
    first, *lines = verdict(run("a card", **{BARE: seconds, FAST: 1.25e-3})).splitlines()
    assert first.rstrip(":.") == f"Rows modelled: 2, measured: 2, off by more than 20 %: {int(is_off)}"
    named = [f"- {CELL}, {BARE}: {1e-3 / seconds:.2f} times the modelled time"]
    assert lines[1:] == named * is_off


def test_a_dry_run_has_columns_and_no_verdict():
    real, dry = (report(run(device, **{BARE: 1e-9})) for device in ("a card", "dry run"))
    assert "off by more than 20 %" in real
    assert "off by" not in dry
    assert DRY in dry
    for page in (real, dry):
        assert "Modelled for a card before the run" in page
        assert "| modelled µs " in page
    assert "Prediction" not in report(run("a card"))
