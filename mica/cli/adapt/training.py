"""Continued pretraining of a model with an adapter: a layer over ``transformers.Trainer``."""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mica.cli import record
from mica.cli.adapt import (
    checkpoints,
    config,
    embeddings,
    evaluation,
    fingerprint,
    global_batch,
    processes,
    result,
    stopping,
    trained_on,
)
from mica.cli.adapt.amount import Amount, Pace
from mica.cli.adapt.base import place_of
from mica.cli.adapt.callbacks import Hooks, Request
from mica.cli.adapt.folder import SETTINGS, SUMMARY
from mica.cli.output import explained
from mica.cli.targets import has_experts
from mica.errors import UsageError

KEPT = 2  # checkpoints
_OF_THE_TRAINER = (  # options that it calls the same
    *("gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm", "seed", "save_steps"),
)


class Training(NamedTuple):
    """What a run did, all its sessions together.

    ``history``: the Trainer's ``log_history``: a dictionary per log, with "step" and "loss" or "eval_…".
    ``steps``, ``tokens``: optimiser steps done, tokens read. ``seconds``: wall time of training, checkpoints
    included, evaluations not. ``loss``: mean training loss over all steps, nats per token. ``interrupted``:
    the signal that ended it, else 0; then nothing but a checkpoint was written. ``adapter_step``: that after
    which the adapter was as it was written. ``stopped_by``: why it ended before its last step, or None.
    ``processes_from``: see `global_batch.history`. ``trained_on``: see `trained_on.of`.
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

    Needs no model: what else the Trainer would find out after the model was loaded and solved.
    """
    unusable = (ValueError, ImportError, RuntimeError)
    with explained(f"--optimizer {args.optimizer}", unusable):
        arguments = _arguments(args, blocks=1)
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    if getattr(arguments.deepspeed_plugin, "zero_stage", None) == 3:
        raise UsageError("DeepSpeed ZeRO-3 shards the adapter: set zero_stage: 2, or take FSDP2")
    for name in args.report_to:
        with explained(f"--report-to {name}", unusable):
            for callback in get_reporting_integration_callbacks([name]):
                callback()


def find_checkpoint(args: argparse.Namespace, note: Callable[[str], None] = lambda text: None) -> Path | None:
    """The checkpoint to go on from; None without ``--resume``, and for a run that ended before its first.

    Every process must call this; the main one chooses, as it reads all files of the checkpoint. ``note`` is
    told where it is not the newest, where that run had ended, and where the best one is damaged.

    Raises UsageError if there is none, or it was written with other options; see `global_batch.check`.
    """
    if not args.resume:
        return None
    newest = next(reversed(checkpoints.marked(args.output)), None)
    begun, ended = ((args.output / name).is_file() for name in (SETTINGS, SUMMARY))
    if newest is None and begun and not ended:
        note(f"{args.output} has no complete checkpoint yet: the run starts from its beginning")
        return None
    checkpoint = processes.on_main(checkpoints.to_resume, args.output)
    _check_marker(checkpoint)
    global_batch.check(checkpoint, _settings(args))
    if checkpoint != newest:
        damage = f"{newest.name} is damaged ({checkpoints.damaged(newest)} is not what was written)"
        note(f"{damage}: the run continues from {checkpoint.name}")
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if why := _stopped_by(state, args):
        note(f"the run ended at step {state.global_step} by {why}; with another value it goes on")
    best = stopping.best(state.log_history, args)
    if best and (warning := processes.on_main(stopping.warn, _folder(args, best))):
        note(warning)
    return checkpoint


def _check_marker(checkpoint: Path) -> None:
    """Raise UsageError if the marker lacks what `train` goes on from, or has it in another form."""
    facts = checkpoints.facts(checkpoint) or {}
    seconds = facts.get("seconds")
    history = facts.get("processes_from", {})
    is_history = isinstance(history, dict) and all(isinstance(each, int) for each in history.values())
    if isinstance(facts.get("step"), int) and isinstance(seconds, int | float) and is_history:
        return
    what = "needs a step, seconds and processes_from as numbers: it was changed, or is not of mica adapt"
    raise UsageError(f"--resume: {checkpoint / checkpoints.MARKER}: {what}")


def _folder(args, step: int) -> Path:
    return args.output / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _settings(args) -> dict[str, Any]:
    """What the marker of a checkpoint holds of the options, by the names that `checkpoints.check` shows."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # `accelerate launch` sets it
    facts = {"processes": PartialState().num_processes, "mixed_precision": precision}
    return facts | config.fixed(args)


def _arguments(args, blocks: int, **more) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.output),
        max_steps=-1 if args.steps is None else args.steps,
        num_train_epochs=args.epochs or 1,
        per_device_train_batch_size=args.batch_size,
        # With a last batch that is smaller, N processes fill theirs up with blocks from the epoch's start.
        dataloader_drop_last=Amount.of(args, blocks, PartialState().num_processes).drops_the_rest,
        dataloader_pin_memory=not processes.use_cpu(),
        lr_scheduler_type=args.scheduler,
        warmup_steps=args.warmup_ratio,  # below 1: the share of all steps
        optim=args.optimizer,
        data_seed=args.seed,
        logging_steps=args.log_steps,
        logging_nan_inf_filter=False,  # or the loss that is shown skips the bad steps
        include_num_input_tokens_seen="all",
        eval_strategy="steps",
        eval_steps=args.eval_steps or 2**31,  # without it: at the start and at the end only
        save_strategy="steps",
        save_total_limit=None,  # see checkpoints.rotate
        report_to=args.report_to or "none",
        remove_unused_columns=False,
        use_cpu=processes.use_cpu(),
        disable_tqdm=True,
        **{name: getattr(args, name) for name in _OF_THE_TRAINER},
        **more,
    )


class _Trainer(Trainer):
    """With exact perplexities, adapters without base weights, and one line for what cannot be written."""

    def __init__(self, *, sets: dict[str, Dataset], output: Path, embedding_rate: float | None, **options):
        super().__init__(**options)
        self.sets, self.output, self.embedding_rate = sets, output, embedding_rate
        self.pace = Pace()

    def create_optimizer(self, *args, **kwargs):
        """The Trainer's own; embeddings get groups with their learning rate, which schedules scale alike."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.embedding_rate is not None:
            embeddings.separate(optimizer, self.model, self.embedding_rate, self.args.optim)
        return optimizer

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """Perplexity and loss of every set, logged. Raises UsageError if one is not finite."""
        begin, metrics = time.perf_counter(), {}
        for name, blocks in self.sets.items():
            batch_size = self.args.per_device_train_batch_size
            score = evaluation.likelihood(self.model, blocks, batch_size, self.args.device)
            metrics[f"{metric_key_prefix}_{name}_perplexity"] = score.perplexity
            metrics[f"{metric_key_prefix}_{name}_loss"] = score.loss
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.pace.measured(time.perf_counter() - begin)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter. Every process must call it: under FSDP2 it is gathered.

        Not by the Trainer's own: that adds a pickle of its arguments, embeddings of the base, and under
        FSDP2 the whole model in the main process's memory (or nothing, with sharded checkpoints).
        """
        folder = Path(output_dir or self.args.output_dir)
        state = result.gathered(self.model)
        # Told to all here: under FSDP2 the others would go on to gather the optimiser's state.
        with checkpoints.written(self.output, folder.name):
            if self.args.should_save:
                model = self.accelerator.unwrap_model(self.model)
                result.write_adapter(model, folder, state)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        # Private to the Trainer. Should a version not call it, a full disk ends in a traceback, and nothing
        # else changes: the marker is written by a callback.
        with checkpoints.written(self.output, f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)


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

    With ``args.keep_best`` it is in the end that of the best step (see `stopping.best`): in the main process,
    and where it is sharded only in what is written.

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
    state, base = PartialState(), model.get_base_model()
    use_cache = getattr(base.config, "use_cache", True)
    trainer, settings = _prepared(model, corpus, args, checkpoint)
    origin = trained_on.of(model, args, checkpoint)
    begin()
    shared = global_batch.history(checkpoint, state.num_processes)
    earlier = checkpoints.facts(checkpoint)["seconds"] if checkpoint is not None else 0.0
    processes.on_main(checkpoints.discard, args.output, checkpoint)
    begun = time.perf_counter()

    def seconds():
        return earlier + time.perf_counter() - begun - trainer.pace.measuring

    def mark(step):
        folder = _folder(args, step)
        with checkpoints.written(args.output, folder.name):
            state.wait_for_everyone()
            if state.is_main_process:
                run = record.read(args.output).run
                own = {"step": step, "seconds": seconds(), "processes_from": shared, "run": run}
                checkpoints.mark(folder, **origin | own | settings)
        if state.is_main_process:  # with the new one safe: what goes wrong here must not remove it
            checkpoints.rotate(args.output, KEPT, stopping.best(trainer.state.log_history, args))

    request = Request(alone=not processes.several(), speaks=state.is_main_process)
    amount = Amount.of(args, len(corpus.train), state.num_processes)
    hooks = Hooks(request, mark, watch, args, amount, trainer.pace)
    trainer.add_callback(hooks)
    with request.heeded():
        finished = checkpoint is not None and _state_if_finished(checkpoint, args)
        if finished:
            trainer.state = finished
        else:
            with processes.peers_needed(lambda: checkpoints.saved(args.output)):
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        base.config.use_cache = use_cache
        stopped = processes.largest(hooks.agreed or request.signum)
        last = trainer.state.global_step
        step = last if stopped else stopping.best(trainer.state.log_history, args) or last
        if not stopped:
            other = None if step == last else processes.on_main(stopping.to_load, _folder(args, step))
            result.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, args.output, other)
    # without the Trainer's own summary at the end, which knows this session only
    history = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    return Training(
        history=history,
        steps=last,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=earlier if finished else seconds(),
        loss=_mean_loss(history),
        interrupted=stopped,
        adapter_step=step,
        stopped_by=_stopped_by(trainer.state, args),
        processes_from=shared,
        trained_on=origin,
    )


def rehearse(model, corpus, args, checkpoint: Path | None, callback: TrainerCallback) -> Trainer:
    """The first steps of `train`, until ``callback`` ends them; returns the Trainer that did them.

    Nothing is logged, measured or saved; ``args.output`` is made.
    """
    silent = argparse.Namespace(**vars(args) | {"report_to": []})
    trainer, _ = _prepared(model, corpus, silent, checkpoint)
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        setattr(trainer.args, name, "no")
    trainer.args.eval_on_start = False
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def _prepared(model, corpus, args, checkpoint: Path | None) -> tuple[_Trainer, dict[str, Any]]:
    """The Trainer, and the settings that checkpoints are marked with and ``checkpoint`` must have."""
    base = model.get_base_model()
    base.config.use_cache = False  # a cache hides where documents begin
    trainer = _build(model, corpus, args, checkpoint)
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
        # Not by TrainingArguments: transformers renamed argument and method, and warns about the old names.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the re-entrant kind gives frozen inputs no gradient
    return trainer, settings


def _build(model, corpus, args, checkpoint) -> _Trainer:
    arguments = _arguments(
        args,
        blocks=len(corpus.train),
        eval_on_start=checkpoint is None,
        ddp_find_unused_parameters=has_experts(model),  # a step may leave an expert's adapter unused
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or one process would train on all GPUs by DataParallel; there is no public way
    sets = {"held_out": corpus.held_out, "retain": corpus.retain}
    trainer = _Trainer(
        sets={name: blocks for name, blocks in sets.items() if blocks is not None},
        output=args.output,
        embedding_rate=args.embedding_learning_rate,
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out,
        data_collator=evaluation.collate,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) < 2:
        raise UsageError("FSDP version 1 shards trained and frozen weights together: set fsdp_version: 2")
    if processes.several():
        # Dropout: other masks for other blocks. numpy takes no seed from 2**32 on.
        set_seed((args.seed + PartialState().process_index) % 2**32)
    return trainer


def _state_if_finished(checkpoint: Path, args) -> TrainerState | None:
    """The state of a run that had ended. The Trainer would do one more step if an epoch has more."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state if _is_done(state, args) or _stopped_by(state, args) else None


def _is_done(state: TrainerState, args) -> bool:
    return state.global_step >= (args.steps or state.max_steps)


def _stopped_by(state: TrainerState, args) -> str | None:
    """Why a run ended, or is to end, before its last step."""
    return None if _is_done(state, args) else stopping.reason(state.log_history, args)


def _mean_loss(history: list[dict[str, Any]]) -> float:
    """Over all steps: a logged loss is the mean since the log before. NaN where nothing was logged."""
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else math.nan
