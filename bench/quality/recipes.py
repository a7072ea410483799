"""The recipes and methods that `bench.quality` compares, and how much it does; no torch."""

from __future__ import annotations

from typing import NamedTuple

from mica.cli.compare.methods import doubling

OPTIONS = {  # name -> default, help
    "epochs": (8, "over the training text"),
    "rounds": (8, "how often the training text states every fact"),
    "length": (96, "tokens in a block, four blocks a step"),
    "people": (8, "invented people, four facts each"),
    "rates": (4, "learning rates of each method, at most"),
    "seeds": (2, "runs at the rates that count: order of batches, dropout, LoRA's start, a random B"),
    "eval_blocks": (16, "blocks of each prose text that is measured"),
}
QUICK = {"epochs": 1, "rounds": 2, "rates": 1, "seeds": 1, "eval_blocks": 1, "length": 32}
STOPS = (0.25, 0.5, 1.0)  # shares of a training after which it is measured


class Recipe(NamedTuple):
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


class Method(NamedTuple):
    """``kind``: "mica", "lora", "full", or MiCA with another frozen B: "random" orthonormal columns, or the
    left singular vectors with the "largest" singular values."""

    name: str
    kind: str
    recipe: str
    rates: tuple[float, ...]
    rank: int | None = None


# Rates enclose what earlier runs chose: by the paper's recipe LoRA has twice the rank and half the rates.
METHODS = [
    *(Method(f"MiCA, r = {rank}", "mica", "all-linear", doubling(5e-4), rank) for rank in (16, 64, 128)),
    *(Method(f"LoRA, r = {rank}", "lora", "all-linear", doubling(2.5e-4), rank) for rank in (16, 32)),
    *(Method(f"frozen random B, r = {r}", "random", "all-linear", doubling(5e-4), r) for r in (16, 64)),
    Method("frozen B of the largest, r = 16", "largest", "all-linear", doubling(5e-4), 16),
    Method("MiCA by the paper, r = 16", "mica", "paper", doubling(5e-4), 16),
    Method("LoRA by the paper, r = 32", "lora", "paper", doubling(2.5e-4), 32),
    Method("full fine-tuning", "full", "all-linear", doubling(5e-5)),
]
