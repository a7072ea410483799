"""Recipes: sets of values that belong together, each with its source. Options override single values."""

from typing import NamedTuple


class Recipe(NamedTuple):
    """``values``: option -> value; ``alpha_per_rank``: lora_alpha is this times the rank."""

    source: str
    alpha_per_rank: int
    values: dict[str, object]


RECIPES = {
    # Continued pretraining in the paper: q_proj and v_proj, r 16 or 32, learning rates from 5e-4 to 2e-3,
    # 4 to 8 epochs. alpha = 2r is not in its text but in the author's example.
    "paper": Recipe(
        "arXiv 2604.01694",
        2,
        {
            "target_modules": "q_proj,v_proj",
            "rank": 16,
            "dropout": 0.05,
            "epochs": 4.0,
            "learning_rate": 5e-4,
            "scheduler": "cosine",
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "max_grad_norm": 0.3,
        },
    ),
    # What mica adapt has done from its first version.
    "all-linear": Recipe(
        "ours",
        1,
        {
            "target_modules": "all-linear",
            "experts": True,  # of a mixture
            "rank": 16,
            "dropout": 0.0,
            "steps": 100,
            "learning_rate": 1e-3,
            "scheduler": "linear",
            "warmup_ratio": 0.05,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        },
    ),
}
