"""The recipes that are compared."""

from bench.quality.recipes import FULL, LORA_ALL, LORA_PAPER, MICA_ALL, MICA_PAPER, RECIPES, Recipe, methods
from mica.cli.adapt import recipes


def test_the_published_recipe():
    """arXiv 2604.01694, and alpha = 2 r as in its author's example."""
    assert RECIPES["paper"] == Recipe(("q_proj", "v_proj"), 2, "cosine", 0.1, 0.01, 0.05, 0.3)


def test_ranges_and_ranks():
    compared = {method.name: method for method in methods(16)}
    assert [*compared] == [MICA_PAPER, LORA_PAPER, MICA_ALL, LORA_ALL, FULL]
    assert compared[MICA_PAPER].rates == (5e-4, 1e-3, 2e-3, 4e-3)
    for ours, other, ratio in ((MICA_PAPER, LORA_PAPER, 2), (MICA_ALL, LORA_ALL, 1)):
        mica, lora = compared[ours], compared[other]
        assert (mica.kind, lora.kind) == ("mica", "lora")
        assert mica.recipe == lora.recipe
        assert (mica.rank, lora.rank) == (16, 16 * ratio)
        assert lora.rates == tuple(rate / 2 for rate in mica.rates)
    assert (compared[FULL].rank, compared[FULL].seeds) == (None, 1)


def test_the_papers_recipe_is_that_of_mica_adapt():
    ours, theirs = RECIPES["paper"], recipes.RECIPES["paper"]
    assert ours.scaling == theirs.alpha_per_rank
    assert ",".join(ours.target_modules) == theirs.values["target_modules"]
    for name, option in (
        ("scheduler",) * 2,
        ("warm_up", "warmup_ratio"),
        *((name, name) for name in ("weight_decay", "dropout", "max_grad_norm")),
    ):
        assert getattr(ours, name) == theirs.values[option]
