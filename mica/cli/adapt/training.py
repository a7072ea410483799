"""Continued pretraining of a model with an adapter: a layer over ``transformers.Trainer``."""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mica.cli import record
from mica.cli.adapt import (
    checkpoints,
    config,
    fingerprint,
    global_batch,
    processes,
    result,
    stopping,
    trained_on,
)
from mica.cli.adapt.amount import Amount
from mica.cli.adapt.base import place_of
from mica.cli.adapt.callbacks import Hooks, Request
from mica.cli.adapt.folder import SETTINGS, SUMMARY
from mica.cli.adapt.trainer import AdapterTrainer, build_trainer, training_arguments
from mica.cli.output import explained
from mica.errors import UsageError

KEPT = 2  # checkpoints


class Training(NamedTuple):
    """What a run did, all its sessions together.

    ``history``: the Trainer's ``log_history``: a dictionary per log, with "step" and "loss" or "eval_…".
    ``steps``, ``tokens``: optimiser steps done, tokens read. ``seconds``: wall time of training, checkpoints
    included, evaluations not. ``loss``: mean training loss over all steps, nats per token. ``interrupted``:
    the number of the signal that ended it, else 0; after a signal only a checkpoint was written.
    ``adapter_step``: the step whose adapter was written. ``stopped_by``: why it ended before its last step,
    or None. ``processes_from``: see `global_batch.history`. ``trained_on``: see `trained_on.of`.
    """

    history: list[dict[str, Any]]
    steps: int
    tokens: int
    seconds: float
    loss: float
    interrupted: int
    adapter_step: int
    stopped_by: str | None
    processes_from: dict[str, int]
    trained_on: dict[str, Any]


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for an ``--optimizer``, ``--report-to`` or DeepSpeed that cannot be used here.

    Needs no model; the Trainer itself would find this out only after the model was loaded and solved.
    """
    unusable = (ValueError, ImportError, RuntimeError)
    with explained(f"--optimizer {args.optimizer}", unusable):
        arguments = training_arguments(args, blocks=1)
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    if getattr(arguments.deepspeed_plugin, "zero_stage", None) == 3:
        raise UsageError("DeepSpeed ZeRO-3 shards the adapter: set zero_stage: 2, or use FSDP2")
    for name in args.report_to:
        with explained(f"--report-to {name}", unusable):
            for callback in get_reporting_integration_callbacks([name]):
                callback()


def find_checkpoint(args: argparse.Namespace, note: Callable[[str], None] = lambda text: None) -> Path | None:
    """The checkpoint to resume from; None without ``--resume``, and for a run that ended before its first.

    Every process must call this; the main one chooses, as it reads all files of the checkpoint. ``note`` gets
    a sentence where it is not the newest, where that run had ended, and where the best one is damaged.

    Raises UsageError if there is none, or it was written with other options; see `global_batch.check`.
    """
    if not args.resume:
        return None
    newest = next(reversed(checkpoints.marked(args.output)), None)
    if newest is None and _is_unfinished(args.output):
        note(f"{args.output} has no complete checkpoint yet: the run starts from its beginning")
        return None

    checkpoint = processes.on_main(checkpoints.to_resume, args.output)
    _check_marker(checkpoint)
    global_batch.check(checkpoint, _settings(args))

    if checkpoint != newest:
        damage = f"{newest.name} is damaged ({checkpoints.damaged(newest)} is not what was written)"
        note(f"{damage}: the run continues from {checkpoint.name}")
    state = _trainer_state(checkpoint)
    reason = _stopped_by(state, args)
    if reason:
        step = state.global_step
        note(f"the run stopped at step {step} because of {reason}; change the option to continue")
    best = stopping.best(state.log_history, args)
    if best:
        warning = processes.on_main(stopping.warn, _folder(args, best))
        if warning:
            note(warning)
    return checkpoint


def _is_unfinished(output: Path) -> bool:
    """Whether ``output`` holds a run that has begun and not ended."""
    has_begun = (output / SETTINGS).is_file()
    has_ended = (output / SUMMARY).is_file()
    return has_begun and not has_ended


def _check_marker(checkpoint: Path) -> None:
    """Raise UsageError if the marker lacks what `train` needs to continue, or has it in another form."""
    facts = checkpoints.facts(checkpoint) or {}
    has_step = isinstance(facts.get("step"), int)
    has_seconds = isinstance(facts.get("seconds"), int | float)
    history = facts.get("processes_from", {})
    has_history = isinstance(history, dict) and all(isinstance(number, int) for number in history.values())
    if has_step and has_seconds and has_history:
        return
    what = "must have step, seconds and processes_from as numbers: it was edited, or is not from mica adapt"
    raise UsageError(f"--resume: {checkpoint / checkpoints.MARKER}: {what}")


def _folder(args: argparse.Namespace, step: int) -> Path:
    return args.output / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the marker of a checkpoint holds of the options, by the names that `checkpoints.check` shows."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # `accelerate launch` sets it
    facts = {"processes": PartialState().num_processes, "mixed_precision": precision}
    return facts | config.fixed(args)


def train(
    model,
    corpus,
    args: argparse.Namespace,
    checkpoint: Path | None,
    tokenizer=None,
    watch: Callable[[list[dict]], None] = lambda history: None,
    begin: Callable[[], None] = lambda: None,
) -> Training:
    """Train the adapter of ``model`` in place, and write it to ``args.output``. Every process must call this.

    With ``args.keep_best`` the adapter ends as that of the best step (see `stopping.best`): in the main
    process, and where it is sharded only in what is written.

    ``model``: the PeftModel, on this process's device; with ``checkpoint`` its adapter must be that of the
    checkpoint. ``corpus``: ``fingerprint``, ``retain_fingerprint``, and ``train``, ``held_out`` and
    ``retain`` (or None), map-style datasets of ``input_ids``, ``labels`` and maybe ``position_ids``, int64 of
    shape (sequence_length,).
    Blocks are drawn in random order, each once an epoch; the last few of an epoch that give no whole batch
    are left out.
    ``tokenizer`` is written beside the adapter. The main process calls ``watch(history)`` after each
    evaluation, every process ``begin()`` once nothing of the checkpoint is refused.

    After a signal (see `callbacks.Request`) it returns with ``interrupted`` and a checkpoint, but no adapter
    in ``args.output``.

    Raises UsageError if a loss or weight is not finite, something cannot be written, the checkpoint was
    written with other options, data or base weights, or that of the best step is damaged; KeyboardInterrupt
    at a second Ctrl-C.
    """
    base = model.get_base_model()
    use_cache = getattr(base.config, "use_cache", True)
    trainer, settings = _prepared(model, corpus, args, checkpoint)
    origin = trained_on.of(model, args, checkpoint)
    begin()
    processes.on_main(checkpoints.discard, args.output, checkpoint)

    session = _Session(trainer, args, checkpoint, settings, origin)
    request = Request(alone=not processes.several(), speaks=PartialState().is_main_process)
    amount = Amount.of(args, len(corpus.train), PartialState().num_processes)
    hooks = Hooks(request, session.mark, watch, args, amount, trainer.pace)
    trainer.add_callback(hooks)
    with request.heeded():
        session.run()
        base.config.use_cache = use_cache
        signum = processes.largest(hooks.agreed or request.signum)
        if signum:
            adapter_step = trainer.state.global_step
        else:
            adapter_step = session.save(tokenizer)

    state = trainer.state
    # without the Trainer's own summary at the end, which knows this session only
    history = [entry for entry in state.log_history if "train_loss" not in entry]
    return Training(
        history=history,
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        seconds=session.seconds(),
        loss=_mean_loss(history),
        interrupted=signum,
        adapter_step=adapter_step,
        stopped_by=_stopped_by(state, args),
        processes_from=session.processes_from,
        trained_on=origin,
    )


class _Session:
    """One call of `train`: its loop, the checkpoints that it marks, and the adapter that it writes.

    Begins to count seconds when it is made. ``settings``, ``origin``: what checkpoints are marked with, from
    `_prepared` and `trained_on.of`.
    """

    def __init__(
        self,
        trainer: AdapterTrainer,
        args: argparse.Namespace,
        checkpoint: Path | None,
        settings: dict[str, Any],
        origin: dict[str, Any],
    ):
        self.processes_from = global_batch.history(checkpoint, PartialState().num_processes)
        self._trainer = trainer
        self._args = args
        self._checkpoint = checkpoint
        self._settings = settings
        self._origin = origin
        self._had_ended = False
        self._earlier = 0.0
        if checkpoint is not None:
            self._earlier = checkpoints.facts(checkpoint)["seconds"]
        self._begun = time.perf_counter()

    def seconds(self) -> float:
        """Seconds spent on training so far, in all sessions together, without evaluations."""
        if self._had_ended:
            return self._earlier
        return self._earlier + time.perf_counter() - self._begun - self._trainer.pace.measuring

    def run(self) -> None:
        """The training loop, up to its end or a signal; nothing for a run that had ended before."""
        state = None
        if self._checkpoint is not None:
            state = _state_if_ended(self._checkpoint, self._args)
        if state is not None:
            self._had_ended = True
            self._trainer.state = state
            return
        with processes.peers_needed(lambda: checkpoints.saved(self._args.output)):
            _train_from(self._trainer, self._checkpoint)

    def mark(self, step: int) -> None:
        """Mark the checkpoint of ``step`` as complete, and remove those that are not kept any more."""
        folder = _folder(self._args, step)
        is_main = PartialState().is_main_process
        with checkpoints.written(self._args.output, folder.name):
            PartialState().wait_for_everyone()
            if is_main:
                own = {
                    "step": step,
                    "seconds": self.seconds(),
                    "processes_from": self.processes_from,
                    "run": record.read(self._args.output).run,
                }
                checkpoints.mark(folder, **self._origin | own | self._settings)
        if is_main:  # the new one is safe now: what goes wrong here must not remove it
            checkpoints.rotate(self._args.output, KEPT, self._best())

    def save(self, tokenizer) -> int:
        """Write the adapter, with ``--keep-best`` that of the best step; returns its step."""
        last = self._trainer.state.global_step
        step = self._best() or last
        other = None
        if step != last:
            other = processes.on_main(stopping.to_load, _folder(self._args, step))
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        result.save(model, tokenizer, self._args.output, other)
        return step

    def _best(self) -> int | None:
        return stopping.best(self._trainer.state.log_history, self._args)


def rehearse(
    model, corpus, args: argparse.Namespace, checkpoint: Path | None, callback: TrainerCallback
) -> Trainer:
    """The first steps of `train`, until ``callback`` ends them; returns the Trainer that did them.

    Nothing is logged, measured or saved; ``args.output`` is made.
    """
    silent = argparse.Namespace(**vars(args) | {"report_to": []})
    trainer, _ = _prepared(model, corpus, silent, checkpoint)
    silence(trainer)
    trainer.add_callback(callback)
    _train_from(trainer, checkpoint)
    return trainer


def silence(trainer: Trainer) -> None:
    """Have it train only: nothing is logged, measured or saved."""
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        setattr(trainer.args, name, "no")
    trainer.args.eval_on_start = False


def _train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    if checkpoint is None:
        trainer.train()
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint))


def _prepared(
    model, corpus, args: argparse.Namespace, checkpoint: Path | None
) -> tuple[AdapterTrainer, dict[str, Any]]:
    """The Trainer, and the settings that checkpoints are marked with and ``checkpoint`` must have."""
    base = model.get_base_model()
    base.config.use_cache = False  # a cache hides where documents begin
    trainer = build_trainer(model, corpus, args, checkpoint)
    settings = {
        **_settings(args),
        "data": f"{len(corpus.train)} blocks ({corpus.fingerprint[:16]})",
        "retain": corpus.retain_fingerprint,
        **fingerprint.facts(place_of(base.name_or_path)),
        "engine": trainer.accelerator.distributed_type.value,
    }
    if checkpoint is not None:
        global_batch.check(checkpoint, settings, len(corpus.train), base)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(base)
    return trainer, settings


def enable_gradient_checkpointing(base) -> None:
    """Not by TrainingArguments: transformers renamed argument and method, and warns about the old names."""
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the re-entrant kind gives frozen inputs no gradient


def _trainer_state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _state_if_ended(checkpoint: Path, args: argparse.Namespace) -> TrainerState | None:
    """The state of a run that had ended, else None. The Trainer would do a step more if the epoch has one."""
    state = _trainer_state(checkpoint)
    if _is_done(state, args) or _stopped_by(state, args):
        return state
    return None


def _is_done(state: TrainerState, args: argparse.Namespace) -> bool:
    return state.global_step >= (args.steps or state.max_steps)


def _stopped_by(state: TrainerState, args: argparse.Namespace) -> str | None:
    """Why a run ended, or is to end, before its last step."""
    if _is_done(state, args):
        return None
    return stopping.reason(state.log_history, args)


def _mean_loss(history: list[dict[str, Any]]) -> float:
    """Over all steps: a logged loss is the mean since the log before. NaN where nothing was logged."""
    total = 0.0
    last = 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    if not last:
        return math.nan
    return total / last
