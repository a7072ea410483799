"""The callbacks alone, with made-up states of a Trainer."""

import io
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from mica.cli.adapt.callbacks import FiniteOnly, Marking, Milestones, Progress, Stopping
from mica.cli.adapt.signals import Request
from mica.errors import UsageError
from tests.support.adapt_runs import fresh_state

ARGS = SimpleNamespace(learning_rate=3e-3)


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    fresh_state()


def state(step=10, main=True, **more):
    return TrainerState(
        global_step=step, max_steps=40, is_world_process_zero=main, num_input_tokens_seen=640, **more
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def log(progress, at, **logs):
    at.num_input_tokens_seen += 1000
    progress.on_step_end(ARGS, at, None)
    progress.on_log(ARGS, at, None, logs={"learning_rate": 1e-3, **logs})


@pytest.mark.parametrize("screen", [Terminal(), io.StringIO()], ids=["terminal", "file"])
@pytest.mark.parametrize("main", [True, False])
def test_progress(monkeypatch, screen, main):
    screen.seek(0)
    screen.truncate()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("mica.cli.adapt.callbacks.peak_memory", lambda: (3 * 2**30, "measured"))
    progress, at = Progress(), state(0, main=main, log_history=[])
    progress.on_train_begin(ARGS, at, None)
    log(progress, at, eval_held_out_perplexity=7.77)
    for step, perplexity in ((20, 6.25), (40, 5.75)):
        at.global_step = step
        log(progress, at, loss=2.5)  # the Trainer logs a step's loss first, and then evaluates
        log(progress, at, eval_held_out_perplexity=perplexity, eval_retain_perplexity=9.5)
    progress.on_train_end(ARGS, at, None)
    progress.close()  # twice is once
    shown = screen.getvalue()
    if not main:
        assert shown == ""
        return
    assert "loss 2.500, lr 1.00e-03, tokens/s " in shown
    assert "peak 3.00 GiB" in shown
    if screen.isatty():
        assert "step 0: held-out perplexity 7.77" in shown
        assert shown.rstrip().endswith(
            "peak 3.00 GiB; step 40: held-out perplexity 5.75, retained perplexity 9.50]"
        )
        return
    lines = [line.partition(": ") for line in shown.splitlines()]
    assert [(step, text) for step, _, text in lines if "loss" not in text] == [
        ("step 0/40", "held-out perplexity 7.77"),
        ("step 20/40", "held-out perplexity 6.25, retained perplexity 9.50"),
        ("step 40/40", "held-out perplexity 5.75, retained perplexity 9.50"),
    ]
    assert [step for step, _, text in lines if text.startswith("loss ") and text.endswith(" left")] == [
        "step 20/40",
        "step 40/40",
    ]
    assert len(lines) == 5


def decide(*callbacks, step=10, **control):
    made = TrainerControl(**control)
    for callback in callbacks:
        callback.on_step_end(ARGS, state(step), made, model=torch.nn.Linear(2, 2))
    return made


def test_milestones():
    assert not decide(Milestones()).should_log
    assert decide(Milestones(), should_save=True).should_log
    last = decide(Milestones(), step=40)
    assert last.should_save
    assert last.should_evaluate
    assert last.should_log


def test_stopping():
    request = Request(repeats_stop=True, announce=lambda name: None)
    stopping = Stopping(request)
    assert not decide(stopping).should_training_stop
    request.note(15)
    made = decide(stopping, Milestones())
    assert made.should_training_stop
    assert made.should_save
    assert made.should_log
    assert stopping.agreed == 15


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(loss):
    finite = FiniteOnly(lambda: "nothing was saved")
    finite.on_log(ARGS, state(), None, logs={"loss": 2.0})
    finite.on_log(ARGS, state(), None, logs={"eval_held_out_loss": loss})  # evaluation has its own check
    with pytest.raises(UsageError, match=r"at or before step 10; nothing was saved\. Try .* \(now 0\.003\)"):
        finite.on_log(ARGS, state(), None, logs={"loss": loss})


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_are_checked_where_they_are_saved(name):
    finite = FiniteOnly(lambda: "nothing was saved")
    layer = torch.nn.Linear(2, 2)
    getattr(layer, name).data.view(-1)[-1] = math.inf
    finite.on_step_end(ARGS, state(), TrainerControl(), model=layer)
    with pytest.raises(UsageError, match="a trained weight is not finite after step 10"):
        finite.on_step_end(ARGS, state(), TrainerControl(should_save=True), model=layer)
    getattr(layer, name).requires_grad_(False)  # the base's own weights are not the run's business
    finite.on_step_end(ARGS, state(), TrainerControl(should_save=True), model=layer)


def test_marking():
    marked = []
    Marking(marked.append).on_save(ARGS, state(), None)
    assert marked == [10]
