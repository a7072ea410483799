"""What happens at the steps of the training loop: progress, checks, stopping."""

import argparse
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import TrainerCallback

from mica.cli.adapt import checkpoints, processes, stopping
from mica.cli.output import tell
from mica.errors import UsageError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PERPLEXITIES = {"held-out": "eval_held_out_perplexity", "retained": "eval_retain_perplexity"}


class Request:
    """The first signal that asked to stop, noted as ``signum`` for the training loop; 0 before."""

    def __init__(self, alone: bool, speaks: bool):
        """``alone``: the only process, so another Ctrl-C raises KeyboardInterrupt. ``speaks``: says so.

        Repeats must not stop one of several processes: a terminal and torchrun both send Ctrl-C to each.
        """
        self.signum = 0
        self._alone = alone
        self._speaks = speaks

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        may_stop_at_once = self._alone and signum == signal.SIGINT
        if self.signum:
            if may_stop_at_once:
                raise KeyboardInterrupt
            return
        self.signum = signum
        if not self._speaks:
            return
        text = f"mica adapt: {signal.Signals(signum).name}: finishing this step and saving a checkpoint"
        if may_stop_at_once:
            text += "; Ctrl-C again stops at once"
        with suppress(OSError):  # closed: the terminal has gone
            os.write(2, f"\n{text}\n".encode())  # not print: Python's own buffers may be in use

    @contextmanager
    def heeded(self) -> Iterator["Request"]:
        """While this context is open, both signals are noted; afterwards they do what they did before.

        A signal that was ignored from the start (``nohup``, a background job of a shell) stays ignored.
        """
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        ours = [signum for signum, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for signum in ours:
            signal.signal(signum, self.note)
        try:
            yield self
        finally:
            for signum in ours:
                signal.signal(signum, before[signum])


class Hooks(TrainerCallback):
    """Prints progress, ends the training, and has the checkpoint of the best step written.

    Progress is one line per log, on standard error. The training ends with a checkpoint after the step in
    which any process got a signal, and where `stopping.reason` gives a reason under ``options``; it ends with
    a UsageError as soon as a loss, or a weight about to be saved, is not finite.

    ``agreed``: the signal's number once all processes know of it, else 0. ``is_under_way``: a step has begun.
    """

    def __init__(self, request: Request, options: argparse.Namespace):
        self._request = request
        self._options = options
        self._begun = 0.0
        self._first = 0  # the steps that were done when this session's first one began
        self.agreed = 0
        self.is_under_way = False

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # else the checkpoint's --eval-steps count

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.is_under_way:
            self._begun = time.perf_counter()
            self._first = state.global_step
        self.is_under_way = True

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.agreed = processes.largest(self._request.signum)
        if self.agreed:
            control.should_save = True
            control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # transformers 5.0 by itself only saves then
        if control.should_save or control.should_evaluate:  # the latter may lead to a checkpoint
            # The logged loss is the mean since the last log, and that mean is not in a checkpoint. Closed at
            # every checkpoint, it is the same number in a run that was resumed there.
            control.should_log = True
            if processes.largest(int(not _is_finite(model))):
                raise self._error("a trained weight is not finite after", args, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        parts = []
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise self._error(
                    f"the training loss is not finite ({logs['loss']}) at or before", args, state
                )
            # if nothing stops it, and steps take this session's mean time
            done = state.global_step - self._first
            seconds = time.perf_counter() - self._begun
            left = tqdm.format_interval((state.max_steps - state.global_step) * seconds / max(1, done))
            parts += [f"loss {logs['loss']:.3f}", f"lr {logs['learning_rate']:.2e}", f"{left} left"]
        for name, key in _PERPLEXITIES.items():
            if key in logs:
                parts.append(f"{name} perplexity {logs[key]:.2f}")
        if parts:
            _print_step(state, ", ".join(parts))

    def on_evaluate(self, args, state, control, **kwargs):
        history = state.log_history
        if stopping.best(history, self._options) == state.global_step:
            control.should_save = True
        if state.global_step >= state.max_steps:
            return
        reason = stopping.reason(history, self._options)
        if reason:
            control.should_save = True
            control.should_training_stop = True
            _print_step(state, f"stopping, {reason}")

    def _error(self, what: str, args, state) -> UsageError:
        saved = checkpoints.saved(Path(args.output_dir))
        return UsageError(
            f"{what} step {state.global_step}; {saved}. "
            f"Try a lower --learning-rate (now {args.learning_rate:g}) or --dtype float32"
        )


def _print_step(state, text: str) -> None:
    if state.is_world_process_zero:
        tell(f"step {state.global_step}/{state.max_steps}: {text}")


def _is_finite(model: torch.nn.Module) -> bool:
    """Whether all trained parameters are finite; under FSDP2: this process's part of them.

    One synchronisation with the device, however many parameters there are.
    """
    checks = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        values = parameter.detach()
        if isinstance(values, DTensor):
            values = values.to_local()
        if values.numel():
            checks.append(values.isfinite().all())
    if not checks:
        return True
    return bool(torch.stack(checks).all())
