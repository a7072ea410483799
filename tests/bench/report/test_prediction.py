"""Prediction beside measurement: every modelled number is called so, and what is off is named."""

import pytest

from bench.report.markdown import report
from bench.report.prediction import TOLERANCE, table, text, verdict
from bench.results.names import BARE, DEVICE_TIME, FAST, STOCK
from tests.support.gpu_results import layers, result

CELL = "layer, 8192 tokens, forward"  # in which these take 1, 2 and 1.25 ms


def predicted(implementation, seconds, cell=CELL):
    row = {"group": f"{cell}, {DEVICE_TIME}", "implementation": implementation, "device": "a card"}
    return {**row, "seconds": seconds, "bytes": 2e6, "launches": 3}


def run(*predictions, device="a card"):
    made = result(*layers(1.25e-3), device=device)
    made.predictions = [*predictions]
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
    said = verdict(run(predicted(BARE, seconds), predicted(FAST, 1.25e-3)))
    first, *_ = said.splitlines()
    assert first.rstrip(":.") == f"Rows modelled: 2, measured: 2, off by more than 20 %: {int(is_off)}"
    named = [line for line in said.splitlines() if line.startswith("- ")]
    assert len(named) == is_off
    for line in named:
        assert line == f"- {CELL}, {BARE}: {1e-3 / seconds:.2f} times the modelled time"


def test_the_table_has_both_and_what_was_not_measured():
    rows = table(run(predicted(STOCK, 1e-3), predicted(BARE, 5e-4), predicted(BARE, 5e-4, "another cell")))
    assert rows.to_dict("list") == {
        "cell": [CELL, "", "another cell"],
        "implementation": [STOCK, BARE, BARE],
        "launches": ["3"] * 3,
        "modelled MB": ["2"] * 3,
        "modelled µs": ["1000", "500", "500"],
        "measured µs": ["2000", "1000", ""],
        "measured ÷ modelled": ["2.00", "2.00", ""],
    }
    only = verdict(run(predicted(BARE, 1e-3, "another cell")))
    assert only == "Rows modelled: 1, measured: 0, off by more than 20 %: 0."


def test_a_dry_run_has_columns_and_no_verdict():
    off = predicted(BARE, 1e-9)
    real, dry = (report(run(off, device=device)) for device in ("a card", "dry run"))
    assert "off by more than 20 %" in real
    assert "off by" not in dry
    for page in (real, dry):
        assert "Modelled for a card before the run" in page
        assert "| modelled µs " in page
    assert "Prediction" not in report(result(*layers(1e-3)))
    assert len(text(run(off), is_dry=True)) == 2
