"""Recipes and methods, which learning rate and which run comes next, and what is missing: no model."""

from dataclasses import astuple
from math import inf, log
from pathlib import Path

import pytest

from bench.quality.recipes import FULL, LORA_ALL, LORA_PAPER, MICA_ALL, MICA_PAPER, RECIPES, Recipe, methods
from bench.quality.schedule import (
    best,
    chosen_rate,
    is_enclosed,
    missing,
    next_rate,
    next_run,
    tried,
    verdict,
)
from mica.cli.adapt import recipes

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


def story(diverges) -> str:
    """All runs in their order, what was missing after some of them, and what the searches found.

    The validation loss grows with the distance to the optimum.
    """
    compared = {method.name: method.facts() for method in methods(16)}
    result, lines = {"settings": {"tries": 6, "seeds": 3}, "methods": compared, "runs": []}, []
    while planned := next_run(result):
        loss = abs(log(planned.rate / OPTIMA[planned.method]))
        evaluation = {"facts, validation, among answers": loss, "prose, validation": loss}
        run = {"diverged": "nan", "evaluation": None} if diverges(planned) else {"diverged": None}
        result["runs"].append(planned._asdict() | {"evaluation": evaluation} | run)
        lines.append(f"{planned.method}, rate {planned.rate:g}, seed {planned.seed}")
        if len(lines) in (9, 16):
            lines[-1] += "".join(f"\n  missing: {line}" for line in missing(result))
    lines += missing(result)
    for name in compared:
        lines.append(
            f"{name}: {verdict(result, name)}, {len(tried(result, name))} rates, {chosen_rate(result, name)}"
        )
    return "\n".join(lines)


STORIES = {
    "every run converges": lambda planned: False,
    "MiCA never converges on all linear layers": lambda planned: planned.method == MICA_ALL,
    "every second seed diverges, and is not repeated": lambda planned: planned.seed == 1,
}


def test_rates_then_seeds_then_full_fine_tuning_and_methods_take_turns():
    told = "\n\n".join(f"# {title}\n{story(diverges)}" for title, diverges in STORIES.items())
    assert told + "\n" == (Path(__file__).parents[1] / "golden" / "schedule.txt").read_text()
