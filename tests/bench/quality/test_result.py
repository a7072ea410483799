"""What follows from a result: the next run, what is missing, the report."""

import json
import shutil
from math import inf, sqrt
from statistics import mean, variance

import pytest

from bench.measure.machine import ROOT
from bench.quality import report
from bench.quality.recipes import METHODS, STOPS
from bench.quality.schedule import (
    KNOWN,
    LIMITS,
    TEST,
    VALIDATION,
    Point,
    chosen,
    planned,
)

GOLDEN = ROOT / "tests" / "bench" / "golden" / "quality.json"
TRADE_OFFS = sorted((ROOT / "bench" / "results").glob("*/*-trade-off.json"))


def golden():
    return json.loads(GOLDEN.read_text())


def after(forgotten, learned):
    """An evaluation; negative: the loss of the questions rose."""
    known = dict.fromkeys(KNOWN, 1.0 + forgotten)
    asked = dict.fromkeys((VALIDATION, "facts, held_out, among answers"), 2.0 - learned)
    right = 0.125 + 0.4 * max(learned, 0)
    return known | asked | {"facts, held_out, picked": right, "prose, held_out": 4.0 - learned / 10}


def start(names, seeds=3):
    result = golden()
    result["settings"]["seeds"] = seeds
    plan = {one.name: one._asdict() for one in METHODS if one.name in names}
    return result | {"plan": plan, "methods": {}, "runs": []}


def run_all(result, outcome):
    """``outcome(run, share)`` -> (forgotten, learned) or None where it diverged. Returns the order."""
    order = []
    while todo := planned(result):
        order.append(todo[0])
        points = [(round(4 * share), outcome(todo[0], share)) for share in STOPS]
        run = todo[0]._asdict() | {"diverged": None if points[-1][1] else "nan"}
        run["points"] = [{"step": step, "evaluation": after(*of)} for step, of in points if of]
        result["runs"].append(run)
    return order


def test_the_middle_rates_come_first_and_other_seeds_where_they_count():
    """At each limit of forgetting; seed 0 chooses, though others have learned more."""
    name = "LoRA, r = 16"

    def outcome(planned, share):
        relative = share * planned.rate / 1e-3
        worse = relative / 1.99 if share < 1 else relative / 2 + 0.01
        return relative**2 + 0.001 * planned.seed, worse + planned.seed

    result = start([name])
    order = [(one.rate, one.seed) for one in run_all(result, outcome)]
    rates = [2.5e-4, 5e-4, 1e-3, 2e-3]
    first = [(rates[number], 0) for number in (1, 2, 0, 3)]
    assert order == first + [(rate, seed) for seed in (1, 2) for rate in rates]
    for limit, rate in zip((0.1, 0.25, 1.0, inf), rates, strict=True):
        found = chosen(result, name, limit)
        assert [(one.rate, one.step, one.seed) for one in found] == [(rate, 4, seed) for seed in (0, 1, 2)]


def test_differences_between_methods_over_seeds_and_questions():
    ours, theirs = report.COMPARED[0]
    result = start((ours, theirs)) | {"texts": {TEST: {"tokens": 64}}}
    run_all(result, lambda one, share: (share, 0.5 + 0.25 * one.seed * (one.method == ours)))
    assert report.values(result, ours, report.RIGHT) == [[], *[pytest.approx([32.5, 42.5, 52.5])] * 4]
    of_questions = mean(p * (100 - p) for p in (32.5, 42.5, 52.5)) + 32.5 * 67.5
    half = 1.96 * sqrt(100 / 3 + of_questions / 64)
    found = report.difference(result, *(chosen(result, name, LIMITS[1]) for name in (ours, theirs)))
    assert found == pytest.approx((10, half))
    assert f"| {ours} less {theirs} |  |{f' +10 ± {half:.0f} |' * 4}\n" in report.report(result)


def test_single_answers_make_a_difference_surer():
    """Of 64 questions both answer 30 rightly, the one 10 more; the same shares without them say less."""
    answers = "1" * 40 + "0" * 24, "1" * 30 + "0" * 34
    result = {"texts": {TEST: {"tokens": 64}}}

    def point(right):
        return Point(1e-3, 4, 0, 0.0, {f"{TEST}, picked": right.count("1") / 64}, right)

    of_pairs = variance([100.0] * 10 + [0.0] * 54)
    paired = [[point(right)] for right in answers]
    assert report.difference(result, *paired) == pytest.approx((1000 / 64, 1.96 * sqrt(of_pairs / 64)))
    of_shares = 62.5 * 37.5 + 46.875 * 53.125
    unpaired = [[one._replace(right="")] for (one,) in paired]
    assert report.difference(result, *unpaired) == pytest.approx((1000 / 64, 1.96 * sqrt(of_shares / 64)))


@pytest.mark.parametrize("path", [*TRADE_OFFS, GOLDEN], ids=lambda path: path.stem)
def test_a_report_and_its_picture_follow_from_its_json(path, tmp_path):
    file = shutil.copy(path, tmp_path / "q.json")
    text = path.with_suffix(".md").read_text()
    assert report.write(file) == file.with_suffix(".md").read_text() == text
    assert file.with_suffix(".png").stat().st_size > 5000


def test_an_unfinished_run_says_what_is_missing():
    text = report.report(golden() | {"runs": []})
    rates = "0.001 (seed 0), 0.002 (seed 0), 0.0005 (seed 0), 0.004 (seed 0)"
    assert f"**This run is not finished.** Missing:\n\n- MiCA, r = 16: learning rate {rates}" in text
    assert "- the further seeds at the rates that these show to count\n" in text
