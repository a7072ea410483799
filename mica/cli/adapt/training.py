"""Continued pretraining of a model with an adapter: a layer over ``transformers.Trainer``."""

import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

from accelerate import PartialState
from peft import PeftModel
from transformers import Trainer, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME

from mica.cli.adapt import base, checkpoints, config, fingerprint, processes, result, stopping
from mica.cli.adapt.callbacks import Hooks, Request
from mica.cli.adapt.folder import SUMMARY
from mica.cli.adapt.trainer import build_trainer, training_arguments
from mica.cli.output import explained, first_sentences
from mica.cli.step_memory import enable_checkpointing
from mica.errors import UsageError

KEPT = 2  # checkpoints


class Training(NamedTuple):
    """What a run did, all its sessions together.

    ``history``: the Trainer's ``log_history``: a dictionary per log, with "step" and "loss" or "eval_…".
    ``steps``, ``tokens``: optimiser steps done, tokens read. ``seconds``: wall time of training, checkpoints
    included, evaluations not. ``interrupted``: the number of the signal that ended it, else 0; after a
    signal only a checkpoint was written. ``adapter_step``: the step whose adapter was written.
    ``stopped_by``: why it ended before its last step, or None. ``base``: see `base.facts`.
    """

    history: list[dict[str, Any]]
    steps: int
    tokens: int
    seconds: float
    interrupted: int
    adapter_step: int
    stopped_by: str | None
    base: dict[str, Any]


def check(args: Namespace) -> None:
    """Raise UsageError for an ``--optimizer``, ``--report-to`` or DeepSpeed that cannot be used here.

    Needs no model; the Trainer itself would find this out only after the model was loaded and solved.
    """
    unusable = (ValueError, ImportError, RuntimeError)
    with explained(f"--optimizer {args.optimizer}", unusable):
        arguments = training_arguments(args, blocks=1)
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    if getattr(arguments.deepspeed_plugin, "zero_stage", None) == 3:
        raise UsageError("DeepSpeed ZeRO-3 shards the adapter: set zero_stage: 2, or use FSDP2")
    for name in args.report_to or ():
        with explained(f"--report-to {name}", unusable):
            for callback in get_reporting_integration_callbacks([name]):
                callback()


def find_checkpoint(args: Namespace, note: Callable[[str], None] = lambda text: None) -> Path | None:
    """The checkpoint to resume from, the newest complete one.

    None without ``--resume``, and for a run that was killed before its first: ``note`` gets a sentence then.
    Every process must call this.

    Raises UsageError if there is none, or it was written with other options; see `checkpoints.check`.
    """
    if not args.resume:
        return None
    checkpoint = processes.on_main(checkpoints.latest, args.output)
    if checkpoint is None:
        if (args.output / SUMMARY).is_file():
            raise UsageError(f"--resume: nothing to continue from in {args.output}: it has no checkpoint")
        note(f"{args.output} has no complete checkpoint yet: the run starts from its beginning")
        return None

    checkpoints.check(checkpoint, **_settings(args))
    checkpoints.check_files(checkpoint)
    return checkpoint


def _settings(args: Namespace) -> dict[str, Any]:
    """What the marker of a checkpoint holds of the options, by the names that `checkpoints.check` shows."""
    return {
        "processes": PartialState().num_processes,
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),  # set by `accelerate launch`
        **config.fixed(args),
    }


class Session:
    """One start of a run: its loop, the checkpoints that it marks, and the adapter that it writes."""

    def __init__(self, model: PeftModel, corpus, args: Namespace, checkpoint: Path | None):
        """Prepare to train ``model`` in place; nothing is written. Every process must call this.

        ``model``: on this process's device; with ``checkpoint`` its adapter must be that of the checkpoint.
        ``corpus``: ``fingerprint``, ``retain_fingerprint``, and ``train``, ``held_out`` and ``retain`` (or
        None), map-style datasets of ``input_ids``, ``labels`` and maybe ``position_ids``, int64 of shape
        (sequence_length,). Blocks are drawn in random order, each once an epoch; the last few of an epoch
        that give no whole batch are left out.

        Raises UsageError if the checkpoint was written with other options, data or base weights.
        """
        self._args = args
        self._checkpoint = checkpoint
        self._facts = base.facts(model, checkpoint or args.adapter)
        self._model = model.get_base_model()
        self._use_cache = getattr(self._model.config, "use_cache", True)
        self._model.config.use_cache = False  # a cache hides where documents begin
        self._trainer = build_trainer(model, corpus, args, checkpoint, self._finish_checkpoint)
        self._settings = {
            **_settings(args),
            "data": f"{len(corpus.train)} blocks ({corpus.fingerprint[:16]})",
            "retain": corpus.retain_fingerprint,
            fingerprint.BASE: self._facts[fingerprint.BASE],
            "engine": self._trainer.accelerator.distributed_type.value,
        }
        if checkpoint is not None:
            checkpoints.check(checkpoint, **self._settings)
        if args.gradient_checkpointing or args.memory is not None:
            enable_checkpointing(self._model)
        self._request = Request(alone=not processes.several(), speaks=PartialState().is_main_process)
        self._hooks = Hooks(self._request, args)
        self._trainer.add_callback(self._hooks)
        self._had_ended = False
        self._earlier = 0.0
        if checkpoint is not None:
            self._earlier = checkpoints.facts(checkpoint)["seconds"]
        self._begun = 0.0

    def train(self, tokenizer=None) -> Training:
        """Train, and write the adapter to ``args.output``, with ``tokenizer`` beside it.

        With ``args.keep_best`` the adapter ends as that of the best step (see `stopping.best`): in the main
        process, and where it is sharded only in what is written. After a signal (see `callbacks.Request`)
        there is a checkpoint, but no adapter. Every process must call this.

        Raises UsageError if a loss or weight is not finite, something cannot be read or written, or the
        checkpoint of the best step is gone; KeyboardInterrupt at a second Ctrl-C.
        """
        self._begun = time.perf_counter()
        with self._request.heeded():
            self._run()
            self._model.config.use_cache = self._use_cache
            signum = processes.largest(self._hooks.agreed or self._request.signum)
            state = self._trainer.state
            adapter_step = state.global_step
            if not signum:
                adapter_step = self._save(tokenizer)

        # without the Trainer's own summary at the end, which knows this session only
        history = [entry for entry in state.log_history if "train_loss" not in entry]
        return Training(
            history=history,
            steps=state.global_step,
            tokens=int(state.num_input_tokens_seen),
            seconds=self._seconds(),
            interrupted=signum,
            adapter_step=adapter_step,
            stopped_by=_stopped_by(state, self._args),
            base=self._facts,
        )

    def _seconds(self) -> float:
        """Seconds spent on training so far, in all sessions together, without evaluations."""
        if self._had_ended:
            return self._earlier
        return self._earlier + time.perf_counter() - self._begun - self._trainer.measuring

    def _run(self) -> None:
        """The training loop, up to its end or a signal; nothing for a run that had ended before."""
        if self._checkpoint is None:
            with processes.peers_needed(lambda: checkpoints.saved(self._args.output)):
                self._trainer.train()
            return
        state = _state_if_ended(self._checkpoint, self._args)
        if state is not None:
            self._had_ended = True
            self._trainer.state = state
            return
        readable = _readable(self._checkpoint, lambda: self._hooks.is_under_way)
        with processes.peers_needed(lambda: checkpoints.saved(self._args.output)), readable:
            self._trainer.train(resume_from_checkpoint=str(self._checkpoint))

    def _finish_checkpoint(self, step: int) -> None:
        """Have the checkpoint of ``step`` count, and remove those that are not kept any more."""
        output = self._args.output
        is_main = PartialState().is_main_process
        with checkpoints.written(output, checkpoints.folder_of(output, step).name):
            PartialState().wait_for_everyone()
            if is_main:
                own = {"step": step, "seconds": self._seconds()}
                checkpoints.finish(output, step, self._facts | own | self._settings)
        if is_main:  # the new one is safe now: what goes wrong here must not remove it
            checkpoints.rotate(output, KEPT, self._best())

    def _save(self, tokenizer) -> int:
        """Write the adapter, with ``--keep-best`` that of the best step; returns its step."""
        last = self._trainer.state.global_step
        step = self._best() or last
        other = None
        if step != last:
            other = processes.on_main(stopping.to_load, checkpoints.folder_of(self._args.output, step))
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        result.save(model, tokenizer, self._args.output, other)
        return step

    def _best(self) -> int | None:
        return stopping.best(self._trainer.state.log_history, self._args)


@contextmanager
def _readable(checkpoint: Path, has_been_read: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raise what goes wrong within as a UsageError, unless ``checkpoint`` has been read by then."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        if has_been_read():
            raise
        reason = first_sentences(str(error))
        if "weights_only" in reason:  # torch's advice is to trust what cannot be read
            reason = "a file of it is damaged"
        raise UsageError(f"--resume: {checkpoint} cannot be read ({reason}): {checkpoints.REMEDY}") from error


def _state_if_ended(checkpoint: Path, args: Namespace) -> TrainerState | None:
    """The state of a run that had ended, else None. The Trainer would do a step more if the epoch has one."""
    with _readable(checkpoint):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if _is_done(state, args) or _stopped_by(state, args):
        return state
    return None


def _is_done(state: TrainerState, args: Namespace) -> bool:
    return state.global_step >= (args.steps or state.max_steps)


def _stopped_by(state: TrainerState, args: Namespace) -> str | None:
    """Why a run ended, or is to end, before its last step."""
    if _is_done(state, args):
        return None
    return stopping.reason(state.log_history, args)
