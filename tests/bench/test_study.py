"""What follows from the raw results of the study of model quality."""

import json
from math import inf, sqrt
from statistics import variance

import matplotlib.image
import pytest

from bench import pages, study
from bench.study import KNOWN, TEST, VALIDATION, Point, chosen

NAME = "LoRA, r = 16"


def result(outcome, rates=(2.5e-4, 5e-4, 1e-3, 2e-3), seeds=2):
    """``outcome(rate, share, seed)`` -> (forgotten, learned) at each of four stops."""

    def evaluation(forgotten, learned):
        known = dict.fromkeys(KNOWN, 1.0 + forgotten)
        return known | {VALIDATION: 2.0 - learned, f"{TEST}, picked": 0.125 + 0.4 * learned}

    runs = []
    for rate in rates:
        for seed in range(seeds):
            points = []
            for step in (1, 2, 3, 4):
                points.append({"step": step, "evaluation": evaluation(*outcome(rate, step / 4, seed))})
            runs.append({"method": NAME, "rate": rate, "seed": seed, "points": points})
    return {"base": evaluation(0, 0), "runs": runs, "plan": {NAME: {}}}


def test_at_each_limit_the_point_that_the_first_seed_chose():
    """The higher the rate, the more is learned and forgotten; other seeds have learned more elsewhere."""
    made = result(
        lambda rate, share, seed: (1000 * rate * share + 0.01 * seed, rate * share * 100 - 0.05 * seed)
    )
    found = {limit: chosen(made, NAME, limit) for limit in (0.01, 0.3, 1.0, inf)}
    assert found[0.01] == []
    assert {(one.rate, one.step, one.seed) for one in found[0.3]} == {(2.5e-4, 4, 0), (2.5e-4, 4, 1)}
    assert {(one.rate, one.step) for one in found[inf]} == {(2e-3, 4)}
    assert study.rates_that_count(made, NAME) == [2.5e-4, 5e-4, 1e-3, 2e-3]


def test_single_answers_make_a_difference_surer():
    """Of 64 questions both answer 30 rightly, the one 10 more."""
    made = {"texts": {TEST: {"tokens": 64}}}

    def point(right):
        return Point(1e-3, 4, 0, 0.0, {f"{TEST}, picked": right.count("1") / 64}, right)

    ours, theirs = [point("1" * 40 + "0" * 24)], [point("1" * 30 + "0" * 34)]
    of_pairs = variance([100.0] * 10 + [0.0] * 54)
    assert study.difference(made, ours, theirs) == pytest.approx((1000 / 64, 1.96 * sqrt(of_pairs / 64)))
    other_seed = [ours[0], ours[0]._replace(seed=1, evaluation={f"{TEST}, picked": 20 / 64})]
    lead, half = study.difference(made, other_seed, theirs)
    assert lead == pytest.approx(0.0)
    assert half > 1.96 * sqrt((31.25**2 / 2) / 2 + of_pairs / 64 / 2)  # the seeds differ, too


def test_the_picture(tmp_path):
    (run,) = pages.sources("quality")
    file = tmp_path / "study.png"
    study.picture(json.loads((pages.RESULTS / f"{run}.json").read_text()), file)
    assert matplotlib.image.imread(file).shape[0] > 500
