"""The report of a committed result of `bench.quality` follows from its JSON."""

import json
from statistics import mean, median

import pytest

from bench.measure.machine import ROOT
from bench.quality import report
from bench.quality.report import FULL, MICA, SAME_RANK, SAME_SIZE, STOCK, Spread

FILE = ROOT / "bench/results/intel-xeon-processor-amx-2-threads/2026-11-25-quality.json"


@pytest.fixture
def result():
    return json.loads(FILE.read_text())


def runs(result, method):
    return [one for one in result["runs"] if one["method"] == method]


def diverge(run):
    run["diverged"], run["evaluation"] = "training loss nan at step 3", None


def rows(text, heading):
    """First cell -> the other cells, of the table under a heading."""
    table = text.split(f"### {heading}")[1].split("\n###")[0]
    lines = (line.split(" | ") for line in table.splitlines() if " | " in line)
    return {name: cells for name, *cells in lines}


def test_the_committed_report_follows_from_its_json(result):
    assert report.report(result) == FILE.with_suffix(".md").read_text()


def test_numbers_worked_out_from_the_json(result):
    """Each method's runs at the rate whose first seed has the lowest validation loss."""
    text, before = report.report(result), result["base"]
    learned, forgotten, cost = (rows(text, heading) for heading in ("Learned", "Forgotten", "Cost"))
    loss, known = "facts, held_out, among answers", "known facts"
    falls = {}
    for name in (MICA, SAME_RANK, SAME_SIZE, FULL):
        own = runs(result, name)
        scores = [
            (e["facts, validation, among answers"] + e["prose, validation"], one["rate"])
            for one in own
            if one["seed"] == 0 and (e := one["evaluation"])
        ]
        after = [one["evaluation"] for one in own if one["rate"] == min(scores)[1]]
        assert len(after) == 2
        for cell, what in ((learned[name][0], loss), (forgotten[name][1], known)):
            values = sorted(e[what] for e in after)
            assert cell == f"{mean(values):.3f} ({values[0]:.3f} to {values[1]:.3f})"
        falls[name] = before[loss] - mean(e[loss] for e in after)
        step = median(second for one in own for second in one["seconds"])
        assert cost[name][5:7] == [f"{step:.2f}", f"{40 * step:.0f}"]
    factors = [f"{falls[MICA] / falls[name]:.2f}x" for name in (SAME_RANK, SAME_SIZE, FULL)]
    assert "MiCA's decrease ÷ the baseline's |  | " + " | ".join(factors) in text
    sizes = [result["methods"][name]["trained_parameters"] for name in (MICA, SAME_RANK)]
    assert f"| {100 * sizes[0] / sizes[1]:.1f} % |" in text


def test_the_difference_of_both_backends(result):
    stock = runs(result, STOCK)[0]
    ours = next(o for o in runs(result, MICA) if (o["rate"], o["seed"]) == (stock["rate"], stock["seed"]))
    pairs = list(zip(ours["losses"], stock["losses"], strict=True))
    assert report.curve_difference(result) == (max(abs(a - b) for a, b in pairs), 40)
    diverge(stock)
    assert report.curve_difference(result) is None


def test_a_diverged_try_is_not_chosen(result):
    rate = report.chosen_rate(result, FULL)
    for one in runs(result, FULL):
        if one["rate"] == rate:
            diverge(one)
    assert report.chosen_rate(result, FULL) not in (rate, None)
    text = report.report(result)
    assert f"- {FULL}, learning rate {rate:g}, seed 0: training loss nan at step 3" in text
    for one in (*runs(result, MICA), *runs(result, STOCK)):
        diverge(one)
    text = report.report(result)
    assert "| none converged |" in text
    assert MICA not in rows(text, "Learned")
    assert rows(text, "Learning rates")[MICA] == ["0.006: diverged, 0.018: diverged", "none converged"]


def test_more_and_less_need_ranges_that_do_not_overlap():
    for ours, other, words in [
        (Spread(2, 1.5, 2.5, 2), Spread(1, 0.5, 1.4, 2), "MiCA: more"),
        (Spread(1, 0.5, 1.4, 2), Spread(2, 1.5, 2.5, 2), "MiCA: less"),
        (Spread(2, 1.4, 2.5, 2), Spread(1, 0.5, 1.5, 2), "no clear difference"),
        (Spread(2, 2, 2, 1), Spread(1, 1, 1, 1), ""),
    ]:
        assert report.compared(ours, other) == words


def test_what_did_not_decrease_has_no_factor(result):
    assert "no factor" not in report.report(result)
    for one in runs(result, FULL):
        one["evaluation"]["facts, held_out, among answers"] = 9.0
    assert "no factor" in report.report(result)


def test_a_quick_run_says_so(result):
    result["settings"]["quick"] = True
    assert report.report(result).startswith("**A quick run. Its numbers mean nothing.**")
