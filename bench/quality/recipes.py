"""The recipes and methods that `bench.quality` compares, and how much it does; no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

MICA_PAPER, LORA_PAPER = "MiCA, paper", "LoRA, paper"
MICA_ALL, LORA_ALL = "MiCA, all-linear", "LoRA, all-linear"
FULL = "full fine-tuning"

OPTIONS = {  # name -> default, help
    "rank": (16, "of MiCA"),
    "epochs": (8, "over the training text"),
    "rounds": (8, "how often the training text states every fact"),
    "length": (96, "tokens in a block, four blocks a step"),
    "people": (8, "invented people, four facts each"),
    "tries": (7, "learning rates tried by a method, at most"),
    "seeds": (3, "runs at the chosen rate: order of batches, dropout, LoRA's start"),
    "eval_blocks": (16, "blocks of each prose text that is measured"),
}
QUICK = {"epochs": 1, "rounds": 2, "tries": 2, "seeds": 1, "eval_blocks": 1, "length": 32}


@dataclass(frozen=True)
class Recipe:
    """How a method is trained. ``scaling``: lora_alpha over the rank; ``warm_up``: share of the steps;
    ``scheduler``: a name of transformers' ``get_scheduler``; ``target_modules``: as in PEFT."""

    target_modules: tuple[str, ...] | str
    scaling: int
    scheduler: str
    warm_up: float
    weight_decay: float
    dropout: float
    max_grad_norm: float


# "paper": arXiv 2604.01694; "all-linear": PEFT's usual target with the Trainer's usual schedule and clipping.
RECIPES = {
    "paper": Recipe(("q_proj", "v_proj"), 2, "cosine", 0.1, 0.01, 0.05, 0.3),
    "all-linear": Recipe("all-linear", 1, "linear", 0.1, 0.0, 0.0, 1.0),
}


@dataclass(frozen=True)
class Method:
    """``kind``: "mica", "lora" or "full"; ``rates``: what is tried in any case, see `bench.quality.schedule`;
    ``seeds``: runs at the best rate, None for as many as are asked for."""

    name: str
    kind: str
    recipe: str
    rates: tuple[float, ...]
    rank: int | None = None
    seeds: int | None = None

    def facts(self) -> dict:
        return asdict(self) | {"rates": [*self.rates]}


def doubling(lowest: float, count: int = 4) -> tuple[float, ...]:
    return tuple(float(f"{lowest * 2**number:.2g}") for number in range(count))


def methods(rank: int) -> list[Method]:
    """All methods, in the order of the tables.

    By the paper's recipe LoRA has twice the rank and half the rates of MiCA, whose range is 5e-4 to 4e-3. On
    all linear layers the ranks are the same, and the ranges higher by 4, since alpha is half of that and the
    best rate of two in an earlier run was 6e-3 for MiCA, and 3e-3 for LoRA.
    Full fine-tuning is last in `bench.quality.schedule`, and has one seed: it takes longest.
    """
    return [
        Method(MICA_PAPER, "mica", "paper", doubling(5e-4), rank),
        Method(LORA_PAPER, "lora", "paper", doubling(2.5e-4), 2 * rank),
        Method(MICA_ALL, "mica", "all-linear", doubling(2e-3), rank),
        Method(LORA_ALL, "lora", "all-linear", doubling(1e-3), rank),
        Method(FULL, "full", "paper", doubling(1e-4), seeds=1),
    ]
