"""The tables of results: of the committed ones, and of one with every outcome (`tests.bench.golden`)."""

import json
from pathlib import Path

import pytest

from bench.measure.machine import ROOT
from bench.quality import report
from bench.quality.report import Spread, compared

GOLDEN = Path(__file__).parents[1] / "golden" / "quality.json"
RESULTS = [*sorted((ROOT / "bench/results").glob("*/*-quality-paper.json")), GOLDEN]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_report_follows_from_its_json(path):
    assert report.report(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


def test_the_table_of_the_page():
    table = report.page_table(json.loads(GOLDEN.read_text())) + "\n"
    assert table == GOLDEN.with_name("quality-page.md").read_text()


def test_a_result_without_runs_has_a_report():
    text = report.report(json.loads(GOLDEN.read_text()) | {"runs": []})
    assert "- full fine-tuning: learning rate 0.0001, 0.0002, 0.0004\n" in text
    assert "\n| full fine-tuning |  | not tried |\n" in text


@pytest.mark.parametrize(
    ("ours", "other", "words"),
    [
        (Spread(2, 1.5, 2.5, 2), Spread(1, 0.5, 1.4, 2), "MiCA: more"),
        (Spread(1, 0.5, 1.4, 2), Spread(2, 1.5, 2.5, 2), "MiCA: less"),
        (Spread(2, 1.4, 2.5, 2), Spread(1, 0.5, 1.5, 2), "no clear difference"),
        (Spread(2, 2, 2, 1), Spread(1, 1, 1, 1), "not compared, one seed"),
        (None, Spread(1, 1, 1, 2), "not compared, one seed"),
    ],
)
def test_more_and_less_need_ranges_that_do_not_overlap(ours, other, words):
    assert compared(ours, other) == words
