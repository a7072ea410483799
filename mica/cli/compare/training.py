"""One training of a comparison: by the Trainer of ``mica adapt``, and what is measured after it."""

import argparse
import math
import time
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm
from transformers import TrainerCallback

from mica.cli.adapt import evaluation
from mica.cli.adapt.trainer import build_trainer
from mica.cli.adapt.training import silence

DIVERGED = "diverged: a loss is not finite"


def measure(model: nn.Module, sets: dict[str, Dataset]) -> dict[str, Any]:
    """ "losses": of every block of every set, nats per token; "failed": None, or `DIVERGED` and no losses."""
    losses = {}
    for name, blocks in sets.items():
        numbers = tqdm(range(len(blocks)), f"Measuring {name}", leave=False, delay=5)
        each = (evaluation.likelihood(model, Subset(blocks, [number]), 1) for number in numbers)
        losses[name] = [likelihood.loss for likelihood in each]
    if all(map(math.isfinite, chain.from_iterable(losses.values()))):
        return {"losses": losses, "failed": None}
    return {"losses": {}, "failed": DIVERGED}


class _Clock(TrainerCallback):
    """Notes when the second step began; the first one fills caches."""

    def __init__(self):
        self.began = 0.0
        self.steps = 0  # since then

    def on_step_end(self, args, state, control, **kwargs):
        self.steps = state.global_step - 1
        if not self.steps:
            self.began = time.perf_counter()


def train(model: nn.Module, data, args: argparse.Namespace) -> dict[str, Any]:
    """Train ``model`` in place for ``args.steps`` steps, as `mica adapt` does with the same options.

    ``data``: as `mica.cli.adapt.training.train` has it. Returns "step_seconds" (the mean) and
    "trained_parameters".
    """
    model.config.use_cache = False  # a cache hides where documents begin
    trainer = build_trainer(model, data, args, None)
    silence(trainer)
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    return {
        "step_seconds": (time.perf_counter() - clock.began) / max(1, clock.steps),
        "trained_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
    }
