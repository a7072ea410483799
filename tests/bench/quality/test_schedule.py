"""Recipes and methods, which learning rate and which run comes next, and what is missing: no model."""

from collections import Counter
from dataclasses import astuple
from math import inf, log

import pytest

from bench.quality.recipes import FULL, LORA_ALL, LORA_PAPER, MICA_ALL, MICA_PAPER, RECIPES, Recipe, methods
from bench.quality.schedule import chosen_rate, missing, next_run, tried, verdict
from bench.quality.search import best, is_enclosed, next_rate
from mica.cli.adapt import recipes

ADAPTERS = (MICA_PAPER, LORA_PAPER, MICA_ALL, LORA_ALL)
OPTIMA = {MICA_PAPER: 6e-3, LORA_PAPER: 1e-3, MICA_ALL: 5e-3, LORA_ALL: 1e-5, FULL: 3e-4}


def test_methods():
    """By arXiv 2604.01694 LoRA has twice the rank and half the rates."""
    assert [astuple(method) for method in methods(16)] == [
        (MICA_PAPER, "mica", "paper", (5e-4, 1e-3, 2e-3, 4e-3), 16, None),
        (LORA_PAPER, "lora", "paper", (2.5e-4, 5e-4, 1e-3, 2e-3), 32, None),
        (MICA_ALL, "mica", "all-linear", (2e-3, 4e-3, 8e-3, 1.6e-2), 16, None),
        (LORA_ALL, "lora", "all-linear", (1e-3, 2e-3, 4e-3, 8e-3), 16, None),
        (FULL, "full", "paper", (1e-4, 2e-4, 4e-4, 8e-4), None, 1),
    ]


def test_the_papers_recipe_is_that_of_mica_adapt():
    """arXiv 2604.01694, and alpha = 2 r as in its author's example."""
    ours, theirs = RECIPES["paper"], recipes.RECIPES["paper"]
    assert ours == Recipe(("q_proj", "v_proj"), 2, "cosine", 0.1, 0.01, 0.05, 0.3)
    assert ours.scaling == theirs.alpha_per_rank
    assert ",".join(ours.target_modules) == theirs.values["target_modules"]
    assert ours.warm_up == theirs.values["warmup_ratio"]
    for name in ("scheduler", "weight_decay", "dropout", "max_grad_norm"):
        assert getattr(ours, name) == theirs.values[name]


@pytest.mark.parametrize(
    ("losses", "limit", "rate", "chosen", "enclosed"),
    [  # the range of 1e-3 and 2e-3 comes first
        ({}, 9, 1e-3, None, False),
        ({1e-3: 3.0}, 9, 2e-3, 1e-3, False),
        # then what is beyond the best, until worse ones are on both sides
        ({1e-3: 3.0, 2e-3: 2.0}, 9, 4e-3, 2e-3, False),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.5}, 9, 8e-3, 4e-3, False),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.5, 8e-3: 1.8}, 9, None, 4e-3, True),
        ({1e-3: 1.0, 2e-3: 2.0}, 3, 5e-4, 1e-3, False),
        ({1e-3: 1.0, 2e-3: 2.0, 5e-4: 0.9}, 3, None, 5e-4, False),  # the limit
        ({1e-3: 1.0}, 1, None, 1e-3, False),
        # one that diverged is worse
        ({1e-3: inf, 2e-3: inf}, 9, 5e-4, None, False),
        ({1e-3: 1.0, 2e-3: inf}, 9, 5e-4, 1e-3, False),
        ({5e-4: 2.0, 1e-3: 1.0, 2e-3: inf}, 9, None, 1e-3, True),
    ],
)
def test_which_learning_rate_is_tried_next(losses, limit, rate, chosen, enclosed):
    assert next_rate(losses, (1e-3, 2e-3), limit) == rate
    assert best(losses) == chosen
    assert is_enclosed(losses) == enclosed


def empty():
    compared = {method.name: method.facts() for method in methods(16)}
    return {"settings": {"tries": 6, "seeds": 3}, "methods": compared, "runs": []}


def do(result, diverges=lambda planned: False, runs=99):
    """Up to so many runs, whose validation loss grows with the distance to the optimum; returns them."""
    order = []
    while len(order) < runs and (planned := next_run(result)):
        order.append(planned)
        loss = abs(log(planned.rate / OPTIMA[planned.method]))
        evaluation = {"facts, validation, among answers": loss, "prose, validation": loss}
        run = {"diverged": "nan", "evaluation": None} if diverges(planned) else {"diverged": None}
        result["runs"].append(planned._asdict() | {"evaluation": evaluation} | run)
    return order


def test_rates_then_seeds_then_full_fine_tuning_and_methods_take_turns():
    result = empty()
    runs = do(result)
    kinds = ["full" if run.method == FULL else "seed" if run.seed else "rate" for run in runs]
    assert [*dict.fromkeys(kinds)] == ["rate", "seed", "full"]
    assert kinds == sorted(kinds, key=["rate", "seed", "full"].index)
    assert len({*runs}) == len(runs)
    for kind in ("rate", "seed"):
        counts = Counter(dict.fromkeys(ADAPTERS, 0))
        for run in [run for run, one in zip(runs, kinds, strict=True) if one == kind][:8]:
            assert counts[run.method] == min(counts.values())
            counts[run.method] += 1
        assert {*counts.values()} == {2}
    for method in ADAPTERS:
        seeds = [(run.rate, run.seed) for run in runs if run.method == method and run.seed]
        assert seeds == [(chosen_rate(result, method), 1), (chosen_rate(result, method), 2)]
    assert all(run.seed == 0 for run in runs if run.method == FULL)
    assert missing(result) == []
    assert verdict(result, MICA_PAPER) == "worse ones on both sides"
    assert verdict(result, LORA_ALL) == "at an edge of the 6 tried, the limit"
    assert len(tried(result, LORA_ALL)) == 6


def test_what_is_missing_is_named():
    result = empty()
    assert verdict(result, FULL) == "not tried"
    do(result, runs=9)
    assert missing(result)[:2] == [
        f"{MICA_PAPER}: learning rate 0.004; seed 1, 2",
        f"{LORA_PAPER}: learning rate 0.001, 0.002; seed 1, 2",
    ]
    assert missing(result)[-1] == f"{FULL}: learning rate 0.0001, 0.0002, 0.0004, 0.0008"
    while len(tried(result, MICA_PAPER)) < 4:
        do(result, runs=1)
    assert missing(result)[0] == f"{MICA_PAPER}: a learning rate beyond those tried; seed 1, 2"
    assert verdict(result, MICA_PAPER) == "at an edge of the 4 tried"


def test_a_method_that_never_converges_has_no_seeds():
    result = empty()
    do(result, lambda planned: planned.method == MICA_ALL)
    assert len(tried(result, MICA_ALL)) == 6
    assert not any(run["seed"] for run in result["runs"] if run["method"] == MICA_ALL)
    assert verdict(result, MICA_ALL) == "none converged"
    assert missing(result) == []


def test_a_seed_that_diverges_is_not_repeated():
    result = empty()
    do(result, lambda planned: planned.seed == 1)
    assert sum(run["diverged"] is not None for run in result["runs"]) == len(ADAPTERS)
