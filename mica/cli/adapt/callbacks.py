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
    """A bar in a terminal, elsewhere one line per log, on standard error and in the main process only.

    Perplexities come with the step that they were measured at: the Trainer logs a step's loss before it
    evaluates there.
    """

    def __init__(self):
        self._bar = None
        self._loss = self._perplexities = ""  # what the bar shows
        self._last = None  # (time, tokens, step) at the last log
        self._begun = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
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
        if "loss" in logs:
            self._loss, left = self._since_last(state, logs)
            self._show(state, f"{self._loss}, {left} left")
        measured = _perplexities(logs)
        if measured:
            self._perplexities = f"; step {state.global_step}: {measured}"
            self._show(state, measured)

    def _show(self, state, text):
        if self._bar is not None:
            self._bar.set_postfix_str(self._loss + self._perplexities)
        else:
            print(f"step {state.global_step}/{state.max_steps}: {text}", file=sys.stderr, flush=True)

    def _since_last(self, state, logs) -> tuple[str, str]:
        """What is known since the last log, and the time that is left."""
        now = (time.perf_counter(), state.num_input_tokens_seen, state.global_step)
        seconds = max(now[0] - self._last[0], 1e-9)
        shown = [
            f"loss {logs['loss']:.3f}",
            f"lr {logs.get('learning_rate', 0):.2e}",
            f"tokens/s {(now[1] - self._last[1]) / seconds:,.0f}",
        ]
        peak, _ = peak_memory()
        if peak:
            shown.append(f"peak {peak / 2**30:.2f} GiB")
        self._last = now
        pace = (now[0] - self._begun[0]) / max(1, now[2] - self._begun[2])
        return ", ".join(shown), tqdm.format_interval(pace * (state.max_steps - now[2]))

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Leave the bar as it is: an error's line comes below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _perplexities(logs: dict) -> str:
    names = {"held-out": "eval_held_out_perplexity", "retained": "eval_retain_perplexity"}
    return ", ".join(f"{name} perplexity {logs[key]:.2f}" for name, key in names.items() if key in logs)
