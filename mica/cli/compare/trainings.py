"""What all trainings of a comparison share, and how one is made, by the Trainer of ``mica adapt``."""

import copy
import gc
import hashlib
import math
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm
from transformers import TrainerCallback

from mica.cli import loading
from mica.cli.adapt import adapter, evaluation, processes, session
from mica.cli.adapt.options import Values
from mica.cli.adapt.packing import document_of, too_little
from mica.cli.adapt.trainer import build_trainer
from mica.cli.compare import methods, schedule, settings
from mica.cli.compare.schedule import BASE, Comparison, Planned, Results
from mica.cli.output import dtype_name
from mica.errors import UsageError
from mica.subspace.content_hash import content_hash

OUT_OF_MEMORY = "out of memory"
DIVERGED = "diverged: a loss is not finite"
_EPOCHS = 4  # of a training at most: a text that is read more often is memorised
_TESTED = 4  # a quarter of the held-out blocks is for the choice of rates, the others for the test


class Trainings:
    """What all trainings of a comparison share, and how each of them is made.

    ``args``: the options of `mica adapt` that they share. ``base``: the model before any training. ``data``:
    the texts. ``sets``: the blocks that are measured, by name; ``blocks``: their number. ``content``: a hash
    of what each option names.
    """

    def __init__(self, found: Values, output: Path):
        """Read model and texts. Raises UsageError for what is wrong with them or with options."""
        resolved = settings.of_mica_adapt(found, output)
        self.args = resolved.args
        processes.start()
        inputs = session.read(resolved)
        self.base = loading.load_model(inputs.source, self.args.dtype, PartialState().device)
        self.data = session.suited(resolved, inputs, self.base)
        if set(self.args.text) & set(self.args.retain):
            session.note("--retain names a text of --text: forgetting is measured on what is learned")
        self.base.requires_grad_(False)
        adapter.check(self.base, self.args)
        self.sets = self._sets()
        self.blocks = sum(map(len, self.sets.values()))
        self.content = {
            "model": _hash_of_weights(self.base),
            "text": self.data.fingerprint,
            "retain": self.data.retain_fingerprint,
        }

    def _sets(self) -> dict:
        held_out = self.data.held_out
        if len(held_out) < 3:
            length = self.args.sequence_length
            what = f"{len(held_out) * length:,} tokens can be held out"
            raise too_little("--text", what, "three blocks", length)
        choosing = _for_choosing(_documents(held_out))
        return {
            "validation": Subset(held_out, choosing),
            "test": Subset(held_out, [number for number in range(len(held_out)) if number not in choosing]),
            "retained": self.data.retain,
        }

    def comparison(self, found: Values, results: Results) -> Comparison:
        """The comparison with the settings ``found``."""
        return Comparison(
            rates=settings.rates(found),
            seeds=found["seeds"],
            budget=60 * found["budget"],
            length=found["steps"],
            longest=_EPOCHS * self.data.amount(self.args).epoch_steps,
            blocks=self.blocks,
            results=results,
        )

    def facts(self) -> dict[str, Any]:
        """What the page says of the trainings: the options of `mica adapt`, and what model and texts have."""
        return vars(self.args) | {
            "dtype": dtype_name(self.base.dtype),
            "blocks": len(self.data.train),
            **{name: len(blocks) for name, blocks in self.sets.items()},
        }

    def make(self, planned: Planned) -> dict:
        """Do what is planned, and return its result."""
        began = time.perf_counter()
        try:
            if planned.method == BASE:
                done = self._of_base()
            else:
                done = self._trained(planned)
        except (MemoryError, RuntimeError) as error:
            if planned.method == BASE or not _is_out_of_memory(error):
                raise
            done = {"losses": {}, "failed": OUT_OF_MEMORY}
        finally:
            gc.collect()  # PEFT's models and the Trainer hold themselves in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return planned._asdict() | done | {"seconds": time.perf_counter() - began, "content": self.content}

    def _trained(self, planned: Planned) -> dict:
        """What was measured of a model after its training."""
        began = time.perf_counter()
        own = {"learning_rate": planned.rate, "steps": planned.steps, "seed": planned.seed}
        args = methods.options(planned.method, self.args, **own)
        measured = {} if planned.phase == schedule.TRIAL else self.sets
        with built(self.base, args) as model:
            start_seconds = time.perf_counter() - began
            done = train(model, self.data, args)
            return done | measure(model, measured) | {"start_seconds": start_seconds}

    def _of_base(self) -> dict:
        began = time.perf_counter()
        measured = measure(self.base, self.sets)
        if measured["failed"]:
            raise UsageError(f"--model {self.args.model}: its loss on these texts is not finite")
        seconds = (time.perf_counter() - began) / self.blocks
        documents = {name: _documents(blocks) for name, blocks in self.sets.items()}
        return measured | {"block_seconds": seconds, "documents": documents}


@contextmanager
def built(base: nn.Module, args: Namespace) -> Iterator[nn.Module]:
    """The model to train with the `options` of a method; afterwards ``base`` is as it was.

    An adapter is put on ``base`` itself; full fine-tuning trains a copy of it, in float32, as small steps are
    lost in 16 bits.

    Raises UsageError as `adapter.start`.
    """
    if args.method == methods.FULL:
        yield copy.deepcopy(base).float().requires_grad_(True)
        return
    model = adapter.start(base, args)
    try:
        yield model
    finally:
        model.unload()
        vars(base).pop("peft_config", None)  # some PEFT leaves it, and warns of a second adapter


def _hash_of_weights(model: nn.Module) -> str:
    """A hash of all weights. It reads 11 GB/s with one thread, which is the speed of memory."""
    total = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        rows = torch.atleast_2d(weight).flatten(0, -2)
        total.update(f"{name} {content_hash(rows)}".encode())
    return total.hexdigest()


def _documents(blocks) -> list[int]:
    return [document_of(blocks, number) for number in range(len(blocks))]


def _for_choosing(documents: list[int]) -> list[int]:
    """Which blocks decide about learning rates: about a quarter. ``documents``: that of each block.

    They are all blocks of some documents, taken in the order of their digests, so that no document has a part
    in both choice and test. If there are too few documents for that, or too long ones, it is every fourth
    block.
    """
    distinct = sorted(set(documents))
    some = distinct[: len(distinct) // _TESTED]
    chosen = [number for number, document in enumerate(documents) if document in some]
    if 0 < len(chosen) <= len(documents) // 2:
        return chosen
    return [*range(0, len(documents), _TESTED)]


def _is_out_of_memory(error: Exception) -> bool:
    is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_known or "can't allocate memory" in str(error)  # the CPU's allocator has no class for it


def measure(model: nn.Module, sets: dict[str, Dataset]) -> dict[str, Any]:
    """The loss of every block of every set, in nats per token, as "losses".

    "failed" is None; or it is `DIVERGED`, if a loss is not finite, and there are no losses.
    """
    losses = {}
    for name, blocks in sets.items():
        numbers = tqdm(range(len(blocks)), f"Measuring {name}", leave=False, delay=5)
        losses[name] = [evaluation.likelihood(model, Subset(blocks, [number]), 1).loss for number in numbers]
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


def train(model: nn.Module, data, args: Namespace) -> dict[str, Any]:
    """Train ``model`` in place for ``args.steps`` steps, as `mica adapt` does with the same options.

    ``data``: as `mica.cli.adapt.training.Session` has it. Returns "step_seconds" (the mean) and
    "trained_parameters".
    """
    model.config.use_cache = False  # a cache hides where documents begin
    trainer = build_trainer(model, data, args, None)
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):  # it only trains
        setattr(trainer.args, name, "no")
    trainer.args.eval_on_start = False
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    return {
        "step_seconds": (time.perf_counter() - clock.began) / max(1, clock.steps),
        "trained_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
    }
