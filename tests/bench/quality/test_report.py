"""The tables of a result: of a tiny one, and of those that are committed."""

import copy
import json
from statistics import mean, median

import pytest

from bench.measure.machine import ROOT
from bench.quality import report
from bench.quality.measures import Spread, compared
from bench.quality.others import OTHERS
from bench.quality.recipes import FULL, LORA_ALL, LORA_PAPER, MICA_ALL, MICA_PAPER
from bench.quality.schedule import chosen_rate

COMMITTED = sorted((ROOT / "bench/results").glob("*/*-quality-paper.json"))


@pytest.fixture
def result(finished):
    return copy.deepcopy(finished)


def runs(result, method):
    return [one for one in result["runs"] if one["method"] == method]


def diverge(run):
    run["diverged"], run["evaluation"] = "training loss nan at step 3", None


def rows(text, heading):
    """First cell -> the other cells, of the table under a heading."""
    table = text.split(f"### {heading}")[1].split("\n###")[0]
    lines = (line.split(" | ") for line in table.splitlines() if " | " in line)
    return {name: cells for name, *cells in lines}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_report_follows_from_its_json(path):
    assert report.report(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


def test_numbers_worked_out_from_the_json(result):
    """Each method's runs at the rate whose first seed has the lowest validation loss."""
    text, before = report.report(result), result["base"]
    learned, forgotten, cost = (rows(text, heading) for heading in ("Learned", "Forgotten", "Cost"))
    loss, known = "facts, held_out, among answers", "known facts"
    falls = {}
    for name in (MICA_PAPER, LORA_PAPER, MICA_ALL, LORA_ALL):
        own = runs(result, name)
        scores = [
            (e["facts, validation, among answers"] + e["prose, validation"], one["rate"])
            for one in own
            if one["seed"] == 0 and (e := one["evaluation"])
        ]
        after = [one["evaluation"] for one in own if one["rate"] == min(scores)[1]]
        assert len(after) == int(learned[name][0]) == 2
        for cell, what in ((learned[name][1], loss), (forgotten[name][2], known)):
            values = sorted(e[what] for e in after)
            low, high = (f"{value:.3f}" for value in values)
            assert cell == (f"{mean(values):.3f} ({low} to {high})" if low != high else low)
        falls[name] = before[loss] - mean(e[loss] for e in after)
        step = median(second for one in own for second in one["seconds"])
        assert cost[name][5] == f"{step:.2f}"
    factors = []
    for mica, lora in ((MICA_PAPER, LORA_PAPER), (MICA_ALL, LORA_ALL)):
        both = falls[mica], falls[lora]
        factors += ["", f"{both[0] / both[1]:.2f}x" if min(both) > 0 else "no factor"]
        sizes = [result["methods"][name]["trained_parameters"] for name in (mica, lora)]
        assert f"| {100 * sizes[0] / sizes[1]:.1f} % |" in text
    assert " | ".join(["MiCA's decrease ÷ the baseline's", *factors]) in text


def test_a_diverged_try_is_not_chosen(result):
    rate = chosen_rate(result, LORA_ALL)
    for one in runs(result, LORA_ALL):
        if one["rate"] == rate:
            diverge(one)
    assert chosen_rate(result, LORA_ALL) not in (rate, None)
    text = report.report(result)
    assert f"- {LORA_ALL}, learning rate {rate:g}, seed 0: training loss nan at step 3" in text
    for one in runs(result, MICA_PAPER):
        diverge(one)
    text = report.report(result)
    assert "| none converged |" in text
    assert MICA_PAPER not in rows(text, "Learned")
    assert rows(text, "Learning rates")[MICA_PAPER][-1] == "none converged"


def test_more_and_less_need_ranges_that_do_not_overlap():
    for ours, other, words in [
        (Spread(2, 1.5, 2.5, 2), Spread(1, 0.5, 1.4, 2), "MiCA: more"),
        (Spread(1, 0.5, 1.4, 2), Spread(2, 1.5, 2.5, 2), "MiCA: less"),
        (Spread(2, 1.4, 2.5, 2), Spread(1, 0.5, 1.5, 2), "no clear difference"),
        (Spread(2, 2, 2, 1), Spread(1, 1, 1, 1), ""),
        (None, Spread(1, 1, 1, 2), ""),
    ]:
        assert compared(ours, other) == words


def set_all(result, method, what, value):
    for one in runs(result, method):
        one["evaluation"][what] = value


def test_in_short(result):
    """Less loss is more learned, and more loss more forgotten."""
    for method, value in ((MICA_PAPER, 1.0), (LORA_PAPER, 2.0)):
        for what in ("facts, held_out, among answers", "prose, held_out", "reference", "known facts"):
            set_all(result, method, what, value)
    head = f"- {MICA_PAPER} against {LORA_PAPER}, r = 8: "
    assert report.in_short(result).splitlines()[0] == (
        f"{head}MiCA: more: learned (new facts, loss among answers), learned (new prose, loss); "
        "MiCA: less: forgot (Python reference, loss), forgot (known facts, loss)."
    )
    for what in ("facts, held_out, among answers", "known facts"):
        set_all(result, LORA_PAPER, what, 1.0)
    assert report.in_short(result).splitlines()[0] == (
        f"{head}no clear difference: learned (new facts, loss among answers), forgot (known facts, loss); "
        "MiCA: more: learned (new prose, loss); MiCA: less: forgot (Python reference, loss)."
    )


def test_what_did_not_decrease_has_no_factor(result):
    for method in (MICA_PAPER, LORA_PAPER, MICA_ALL, LORA_ALL):
        set_all(result, method, "facts, held_out, among answers", 0.5)
    assert "no factor" not in report.report(result)
    set_all(result, LORA_ALL, "facts, held_out, among answers", 99.0)
    assert "no factor" in report.report(result)


def test_the_table_of_the_page(result):
    lines = report.page_table(result).splitlines()
    assert len(lines) == 2 + len(result["methods"])
    (line,) = (line for line in lines if line.startswith(f"| {LORA_PAPER}, r = 8 | "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    learned = rows(report.report(result), "Learned")[LORA_PAPER]
    rate, right = f"{chosen_rate(result, LORA_PAPER):g}", learned[2].replace(" to ", "–")
    assert cells[2:5] == [rate, "no", right]
    assert lines[-1].startswith(f"| {FULL}, all weights | ")
    assert len({line.count("|") for line in lines}) == 1


def test_a_result_without_runs_has_a_report(begin, finished):
    text = report.report(begin() | {"base": finished["base"]})
    assert "**This run is not finished.**" in text
    assert rows(text, "Learning rates")[FULL] == ["", "not tried"]


def test_every_commit_that_made_runs_is_named(result):
    result["starts"] = [{"commit": name} for name in ("abc", "def", "abc")]
    assert report.report(result).startswith("tiny; cpu a machine, threads 2; commit abc, def.\n")


def test_what_others_found_stands_beside_it(result):
    assert all(" | ".join(row) in report.report(result) for row in OTHERS)


def test_a_quick_run_says_so(result):
    assert "quick run" not in report.report(result)
    result["settings"]["quick"] = True
    assert report.report(result).startswith("**A quick run. Its numbers mean nothing.**")
