"""One training of a comparison: by the Trainer of ``mica adapt``, and what is measured after it."""

import argparse
import math
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback

from mica.cli.adapt import evaluation
from mica.cli.adapt.trainer import build_trainer
from mica.cli.adapt.training import enable_gradient_checkpointing, silence

DIVERGED = "diverged: a loss is not finite"
Losses = dict[str, list[float]]


def losses(model: nn.Module, sets: dict[str, Dataset]) -> Losses:
    """The loss of every block of every set, nats per token."""
    found = {}
    for name, blocks in sets.items():
        each = (evaluation.likelihood(model, Subset(blocks, [n]), 1) for n in range(len(blocks)))
        found[name] = [likelihood.loss for likelihood in each]
    return found


class _Watch(TrainerCallback):
    """Notes when the second step began; the first one fills caches. ``watch`` is called after each step."""

    def __init__(self, watch: Callable[[], None]):
        self._watch = watch
        self.began = 0.0
        self.steps = 0  # since then

    def on_step_end(self, args, state, control, **kwargs):
        self._watch()
        self.steps = state.global_step - 1
        if not self.steps:
            self.began = time.perf_counter()


def train(
    model: nn.Module,
    data,
    args: argparse.Namespace,
    sets: dict[str, Dataset],
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train ``model`` in place for ``args.steps`` steps, as `mica adapt` does with the same options.

    ``data``: as `mica.cli.adapt.training.train` has it. ``sets``: what is measured at the end, if anything.
    ``watch`` is called after each step.

    Returns "points" (the last "step" and the `losses` on ``sets``, a list of one; of none without sets, or
    where a loss is not finite), "failed" (None, or why there are none), "step_seconds" and "block_seconds"
    (means of steps and of measured blocks), "trained_parameters" and "bytes": of weights, gradients and the
    optimiser's state.
    """
    model.config.use_cache = False  # a cache hides where documents begin
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    trainer = build_trainer(model, data, args, None)
    silence(trainer)
    seen = _Watch(watch)
    trainer.add_callback(seen)
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ended = time.perf_counter()
    measured = losses(model, sets)
    blocks = sum(map(len, measured.values()))
    failed = None
    points = []
    if not is_finite(measured):
        failed = DIVERGED
    elif sets:
        points = [{"step": args.steps, **measured}]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "points": points,
        "failed": failed,
        "step_seconds": (ended - seen.began) / max(1, seen.steps),
        "block_seconds": (time.perf_counter() - ended) / max(1, blocks),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "bytes": _bytes(model, trained, trainer.optimizer),
    }


def is_finite(measured: Losses) -> bool:
    """Whether no loss is NaN or infinite."""
    return all(map(math.isfinite, chain.from_iterable(measured.values())))


def _bytes(model: nn.Module, trained: list[nn.Parameter], optimizer) -> int:
    """Of all weights, the gradients of the trained ones, and the optimiser's state."""
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    tensors = [*model.parameters(), *trained, *state]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
