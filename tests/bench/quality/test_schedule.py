"""What comes next, and what is missing, from made-up results."""

import math
from collections import Counter

import pytest

from bench.quality.recipes import FULL, LORA_ALL, LORA_PAPER, MICA_ALL, MICA_PAPER, methods
from bench.quality.schedule import chosen_rate, missing, next_run, tried, verdict

ADAPTERS = (MICA_PAPER, LORA_PAPER, MICA_ALL, LORA_ALL)
OPTIMA = {MICA_PAPER: 6e-3, LORA_PAPER: 1e-3, MICA_ALL: 5e-3, LORA_ALL: 1e-5, FULL: 3e-4}


def empty(tries=6, seeds=3):
    compared = {method.name: method.facts() for method in methods(16)}
    return {"settings": {"tries": tries, "seeds": seeds}, "methods": compared, "runs": []}


def do(result, planned, loss=None):
    """As if the run had this validation loss; by default that grows with the distance to the optimum."""
    loss = abs(math.log(planned.rate / OPTIMA[planned.method])) if loss is None else loss
    losses = {"facts, validation, among answers": loss, "prose, validation": loss}
    diverged = None if math.isfinite(loss) else "training loss nan at step 3"
    evaluation = None if diverged else losses
    result["runs"].append(planned._asdict() | {"diverged": diverged, "evaluation": evaluation})


@pytest.fixture(scope="module")
def order():
    result, order = empty(), []
    while planned := next_run(result):
        order.append(planned)
        do(result, planned)
    return result, order


def test_rates_then_seeds_then_full_fine_tuning(order):
    _, runs = order
    kinds = ["full" if run.method == FULL else "seed" if run.seed else "rate" for run in runs]
    assert [*dict.fromkeys(kinds)] == ["rate", "seed", "full"]
    assert kinds == sorted(kinds, key=["rate", "seed", "full"].index)
    assert len({*runs}) == len(runs)


def test_methods_take_turns(order):
    _, runs = order
    for kind in (False, True):
        counts = Counter(dict.fromkeys(ADAPTERS, 0))
        for run in [one for one in runs if (one.seed > 0) == kind and one.method != FULL][:8]:
            assert counts[run.method] == min(counts.values())
            counts[run.method] += 1
        assert {*counts.values()} == {2}


def test_seeds_are_at_the_best_rate(order):
    result, runs = order
    for method in ADAPTERS:
        seeds = [(run.rate, run.seed) for run in runs if run.method == method and run.seed]
        assert seeds == [(chosen_rate(result, method), 1), (chosen_rate(result, method), 2)]
    assert all(run.seed == 0 for run in runs if run.method == FULL)


def test_verdicts(order):
    result, _ = order
    assert verdict(result, MICA_PAPER) == "worse ones on both sides"
    assert verdict(result, LORA_ALL) == "at an edge of the 6 tried, the limit"
    assert len(tried(result, LORA_ALL)) == 6
    assert missing(result) == []
    assert verdict(empty(), FULL) == "not tried"


def test_what_is_missing_is_named():
    result = empty()
    for _ in range(9):
        do(result, next_run(result))
    assert missing(result)[:2] == [
        f"{MICA_PAPER}: learning rate 0.004; seed 1, 2",
        f"{LORA_PAPER}: learning rate 0.001, 0.002; seed 1, 2",
    ]
    assert missing(result)[-1] == f"{FULL}: learning rate 0.0001, 0.0002, 0.0004, 0.0008"
    while len(tried(result, MICA_PAPER)) < 4:
        do(result, next_run(result))
    assert missing(result)[0] == f"{MICA_PAPER}: a learning rate beyond those tried; seed 1, 2"
    assert verdict(result, MICA_PAPER) == "at an edge of the 4 tried"


def test_a_method_that_never_converges_has_no_seeds():
    result = empty()
    while planned := next_run(result):
        do(result, planned, math.inf if planned.method == MICA_ALL else None)
    assert len(tried(result, MICA_ALL)) == 6
    assert not any(run["seed"] for run in result["runs"] if run["method"] == MICA_ALL)
    assert verdict(result, MICA_ALL) == "none converged"
    assert missing(result) == []


def test_a_seed_that_diverges_is_not_repeated():
    result = empty()
    while planned := next_run(result):
        do(result, planned, math.inf if planned.seed == 1 else None)
    assert sum(run["diverged"] is not None for run in result["runs"]) == len(ADAPTERS)
