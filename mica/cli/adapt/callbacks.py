"""What happens at the steps of the training loop: progress, checks, checkpoints that count, stopping."""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from mica.cli.adapt import checkpoints, processes, stopping
from mica.cli.adapt.amount import Amount, Pace, measurements
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
        self._alone, self._speaks = alone, speaks

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        again = self._alone and signum == signal.SIGINT
        if self.signum:
            if again:
                raise KeyboardInterrupt
            return
        self.signum = signum
        if self._speaks:
            text = f"mica adapt: {signal.Signals(signum).name}: finishing this step and saving a checkpoint"
            with suppress(OSError):  # closed: the terminal has gone
                # Python's own buffers may be in use
                os.write(2, f"\n{text}{'; Ctrl-C again stops at once' * again}\n".encode())

    @contextmanager
    def heeded(self) -> Iterator["Request"]:
        """Within it both signals are noted; afterwards they do again what they did before.

        One that was ignored from the start (``nohup``, a background job of a shell) stays ignored.
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
    """A line a log on standard error; ends the training; marks checkpoints, and adds that of the best step.

    It ends with a checkpoint after the step in which any process got a signal and where `stopping.reason` has
    one by ``options``, and with a UsageError as soon as a loss, or a weight about to be saved, is not finite.

    ``amount``, ``pace``: for the time that is left; ``pace`` is told of measurements by who makes them.
    ``mark(step)`` is called in every process once all files of a checkpoint are written, ``watch(history)``
    in the main one after each evaluation.
    ``agreed``: the signal's number once all processes know of it, else 0.
    """

    def __init__(
        self,
        request: Request,
        mark: Callable[[int], None],
        watch: Callable[[list[dict]], None],
        options: argparse.Namespace,
        amount: Amount,
        pace: Pace,
    ):
        self._request, self._mark, self._watch, self._options = request, mark, watch, options
        self._amount, self._pace = amount, pace
        self._begun = 0.0
        self._first = 0  # the steps that were done when this session began
        self.agreed = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun = time.perf_counter()
        self._first = state.global_step
        state.compute_steps(args, state.max_steps)  # or after --resume --eval-steps N those of before count

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.agreed = processes.largest(self._request.signum)
        if self.agreed:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # of itself transformers 5.0 only saves then
        if control.should_save or (control.should_evaluate and stopping.judges(self._options)):
            # The logged loss is the mean since the last log, and that mean is not in a checkpoint. Closed at
            # every checkpoint, it is the same number in a run that was resumed there.
            control.should_log = True
            if processes.largest(int(not _is_finite(model))):
                raise self._error("a trained weight is not finite after", args, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        told = [f"{name} perplexity {logs[key]:.2f}" for name, key in _PERPLEXITIES.items() if key in logs]
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                what = f"the training loss is not finite ({logs['loss']}) at or before"
                raise self._error(what, args, state)
            left = tqdm.format_interval(self._seconds_left(state))
            told = [f"loss {logs['loss']:.3f}", f"lr {logs['learning_rate']:.2e}", f"{left} left", *told]
        if told and state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps}: {', '.join(told)}", file=sys.stderr)

    def _seconds_left(self, state) -> float:
        """Until the training ends, if nothing stops it: a step is logged before it is measured."""
        now, last = state.global_step, state.max_steps
        done, read, in_all = (self._amount.blocks_after(step) for step in (self._first, now, last))
        training = time.perf_counter() - self._begun - self._pace.measuring
        ahead = measurements(now - 1, last, self._options.eval_steps)
        return self._pace.left(training, read - done, in_all - read, ahead)

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._watch(state.log_history)
        history, options = state.log_history, self._options
        if stopping.best(history, options) == state.global_step:
            control.should_save = True
        if state.global_step < state.max_steps and (why := stopping.reason(history, options)):
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                print(f"step {state.global_step}/{state.max_steps}: stopping, {why}", file=sys.stderr)

    def on_save(self, args, state, control, **kwargs):
        self._mark(state.global_step)

    def _error(self, what, args, state):
        what = f"{what} step {state.global_step}; {checkpoints.saved(Path(args.output_dir))}"
        lower = f"a lower --learning-rate (now {args.learning_rate:g})"
        return UsageError(f"{what}. Try {lower} or --dtype float32")


def _is_finite(model: torch.nn.Module) -> bool:
    """Whether all trained parameters are; under FSDP2: this process's part of them. One synchronisation."""
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in trained]
    checks = [tensor.isfinite().all() for tensor in local if tensor.numel()]
    return not checks or bool(torch.stack(checks).all())
