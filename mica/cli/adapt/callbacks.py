"""What happens at the steps of the training loop: progress, checks, checkpoints that count, stopping."""

import math
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from mica.cli.adapt import processes, signals
from mica.cli.adapt.summary import peak_memory
from mica.errors import UsageError


class Milestones(TrainerCallback):
    """Decides at the end of a step: log where a checkpoint is written, and everything at the last step.

    The logged loss is the mean since the last log, and that mean is not in a checkpoint. Closed at every
    checkpoint, it is the same number in a run that was resumed there.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_save = control.should_evaluate = True
        if control.should_save:
            control.should_log = True
        return control


class Stopping(TrainerCallback):
    """Ends the training after the step in which any process got a signal, with a checkpoint.

    ``agreed``: the signal's number once all processes know of it, else 0. Must come before `Milestones`.
    """

    def __init__(self, request: signals.Request):
        self._request = request
        self.agreed = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = processes.largest(self._request.signum)
        if self.agreed:
            control.should_save = control.should_training_stop = True
        return control


class FiniteOnly(TrainerCallback):
    """Ends the training with a UsageError as soon as a loss, or a weight about to be saved, is not finite.

    ``saved()`` says in half a sentence what can be gone on from. Must come after `Milestones`.
    """

    def __init__(self, saved: Callable[[], str]):
        self._saved = saved

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise self._error(f"the training loss is not finite ({loss}) at or before", args, state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_save and processes.largest(int(not _is_finite(model))):
            raise self._error("a trained weight is not finite after", args, state)

    def _error(self, what, args, state):
        return UsageError(
            f"{what} step {state.global_step}; {self._saved()}. Try a lower --learning-rate (now "
            f"{args.learning_rate:g}) or --dtype float32"
        )


def _is_finite(model: torch.nn.Module) -> bool:
    """Whether all trained parameters are; under FSDP2: this process's part of them. One synchronisation."""
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in trained]
    checks = [tensor.isfinite().all() for tensor in local if tensor.numel()]
    return not checks or bool(torch.stack(checks).all())


class Marking(TrainerCallback):
    """Calls ``mark(step)`` in every process once all files of a checkpoint are written."""

    def __init__(self, mark: Callable[[int], None]):
        self._mark = mark

    def on_save(self, args, state, control, **kwargs):
        self._mark(state.global_step)


class Watching(TrainerCallback):
    """Calls ``watch(history)`` in the main process after each evaluation."""

    def __init__(self, watch: Callable[[list[dict]], None]):
        self._watch = watch

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._watch(state.log_history)


class Progress(TrainerCallback):
    """A bar in a terminal, elsewhere one line per log, on standard error and in the main process only."""

    def __init__(self):
        self._bar = None
        self._perplexity = None
        self._last = None  # (time, tokens, step) at the last log
        self._begun = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        for entry in state.log_history:  # of the sessions before
            self._perplexity = entry.get("eval_held_out_perplexity", self._perplexity)
        self._begun = self._last = (time.perf_counter(), state.num_input_tokens_seen, state.global_step)
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        self._perplexity = logs.get("eval_held_out_perplexity", self._perplexity)
        if "loss" in logs:
            self._show(state, logs)

    def _show(self, state, logs):
        now = (time.perf_counter(), state.num_input_tokens_seen, state.global_step)
        seconds = max(now[0] - self._last[0], 1e-9)
        shown = {
            "loss": f"{logs['loss']:.3f}",
            "lr": f"{logs.get('learning_rate', 0):.2e}",
            "tokens/s": f"{(now[1] - self._last[1]) / seconds:,.0f}",
        }
        peak, _ = peak_memory()
        if peak:
            shown["peak"] = f"{peak / 2**30:.2f} GiB"
        if self._perplexity is not None:
            shown["held-out perplexity"] = f"{self._perplexity:.2f}"
        self._last = now
        text = ", ".join(f"{name} {value}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        pace = (now[0] - self._begun[0]) / max(1, now[2] - self._begun[2])
        left = tqdm.format_interval(pace * (state.max_steps - now[2]))
        print(f"step {state.global_step}/{state.max_steps}: {text}, {left} left", file=sys.stderr, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Leave the bar as it is: an error's line comes below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
