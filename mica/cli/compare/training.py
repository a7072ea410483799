"""One training of a comparison: by the Trainer of ``mica adapt``, measured at a few stops."""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback

from mica.cli.adapt import evaluation
from mica.cli.adapt.trainer import build_trainer
from mica.cli.adapt.training import enable_gradient_checkpointing, silence

Losses = dict[str, list[float]]


def losses(model: nn.Module, sets: dict[str, Dataset]) -> Losses:
    """The loss of every block of every set, nats per token."""
    found = {}
    for name, blocks in sets.items():
        each = (evaluation.likelihood(model, Subset(blocks, [n]), 1) for n in range(len(blocks)))
        found[name] = [one.loss for one in each]
    return found


class _Stops(TrainerCallback):
    """Measures after the steps ``stops``, and ends the training where a loss is not finite."""

    def __init__(self, stops: Iterable[int], measure: Callable[[nn.Module], dict], watch: Callable[[], None]):
        self._stops = set(stops)
        self._measure = measure
        self._watch = watch
        self.points: list[dict] = []
        self.failed: str | None = None
        self.measuring = 0.0  # seconds
        self.blocks = 0  # measured in them
        self.began = 0.0  # when the second step did; the first one fills caches
        self.steps = 0  # since then

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._watch()
        step = state.global_step
        self.steps = step - 1
        if step in self._stops:
            self._at_a_stop(step, model, control)
        if step == 1:
            self.began = time.perf_counter() - self.measuring

    def _at_a_stop(self, step: int, model, control) -> None:
        begin = time.perf_counter()
        measured = self._measure(model)
        self.measuring += time.perf_counter() - begin
        self.blocks += sum(map(len, measured.values()))
        for name, each in measured.items():
            bad = [loss for loss in each if not math.isfinite(loss)]
            if bad:
                self.failed = f"diverged: loss on the {name} text {bad[0]} after step {step}"
                control.should_training_stop = True
                return
        self.points.append({"step": step, **measured})


def train(
    model: nn.Module,
    data,
    args: argparse.Namespace,
    stops: Iterable[int],
    measure: Callable[[nn.Module], Losses],
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train ``model`` in place for ``args.steps`` steps, as `mica adapt` does with the same options.

    ``data``: as `mica.cli.adapt.training.train` has it. ``watch`` is called after each step.

    Returns "points" (for each of ``stops`` its "step" and what ``measure(model)`` gives, losses per set),
    "failed" (None, or why the training ended before its last step), "step_seconds" and "block_seconds"
    (means of steps and of measured blocks), "trained_parameters" and "bytes": of weights, gradients and the
    optimiser's state.
    """
    model.config.use_cache = False  # a cache hides where documents begin
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    trainer = build_trainer(model, data, args, None)
    silence(trainer)
    seen = _Stops(stops, measure, watch)
    trainer.add_callback(seen)
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - seen.began - seen.measuring
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "points": seen.points,
        "failed": seen.failed,
        "step_seconds": seconds / max(1, seen.steps),
        "block_seconds": seen.measuring / max(1, seen.blocks),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "bytes": _bytes(model, trained, trainer.optimizer),
    }


def _bytes(model: nn.Module, trained: list[nn.Parameter], optimizer) -> int:
    """Of all weights, the gradients of the trained ones, and the optimiser's state."""
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    tensors = [*model.parameters(), *trained, *state]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
