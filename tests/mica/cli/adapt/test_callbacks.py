"""The callback alone, with made-up states of a Trainer, and signals that this process sends to itself."""

import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from mica.cli.adapt.amount import Amount, Pace
from mica.cli.adapt.callbacks import SIGNALS, Hooks, Request
from mica.errors import UsageError
from tests.support.adapt_runs import fresh_state  # noqa: F401 (a fixture)

ARGS = SimpleNamespace(
    learning_rate=3e-3, output_dir="nowhere", logging_steps=5, eval_steps=None, save_steps=5
)
INT, TERM = SIGNALS


def state(step=10, main=True):
    return TrainerState(global_step=step, max_steps=40, is_world_process_zero=main, log_history=["a"])


def begun(main=True, calls=None, pace=None, blocks=120):
    """Hooks of a run that has begun; the steps that are marked are appended to ``calls``."""
    note = (calls if calls is not None else []).append
    options = SimpleNamespace(keep_best=False, patience=None, max_retain_rise=None, eval_steps=20)
    amount = Amount(blocks, sequence_length=32, batch_size=1, accumulation=3, processes=1)
    hooks = Hooks(Request(alone=True, speaks=False), note, options, amount, pace or Pace())
    hooks.on_train_begin(ARGS, state(0, main), None)
    return hooks


def at_step(hooks, step=10, model=None, **control):
    made = TrainerControl(**control)
    hooks.on_step_end(ARGS, state(step), made, model=model or torch.nn.Linear(2, 2))
    return made


@pytest.mark.parametrize("main", [True, False])
def test_progress(monkeypatch, main, capsys):
    clock = SimpleNamespace(perf_counter=iter([5, 65, 125]).__next__)
    monkeypatch.setattr("mica.cli.adapt.callbacks.time", clock)
    hooks = begun(main)
    hooks.on_log(ARGS, state(0, main), None, logs={"eval_held_out_perplexity": 7.77})
    for step, perplexity in ((20, 6.25), (40, 5.75)):
        at_step(hooks, step)  # the Trainer logs a step's loss first, and then evaluates
        hooks.on_log(ARGS, state(step, main), None, logs={"learning_rate": 1e-3, "loss": 2.5})
        measured = {"eval_held_out_perplexity": perplexity, "eval_retain_perplexity": 9.5}
        hooks.on_log(ARGS, state(step, main), None, logs=measured)
    hooks.on_log(ARGS, state(40, main), None, logs={"train_loss": 2.5})  # the Trainer's own end
    expected = [
        "step 0/40: held-out perplexity 7.77",
        "step 20/40: loss 2.500, lr 1.00e-03, 01:00 left",
        "step 20/40: held-out perplexity 6.25, retained perplexity 9.50",
        "step 40/40: loss 2.500, lr 1.00e-03, 00:00 left",
        "step 40/40: held-out perplexity 5.75, retained perplexity 9.50",
    ]
    assert capsys.readouterr().err.splitlines() == (expected if main else [])


def test_the_time_left_is_that_of_blocks_and_measurements(monkeypatch, capsys):
    """The last of 34 steps of an epoch has one block; measurements take longer than steps, the first too."""
    clock = SimpleNamespace(perf_counter=iter([0, 1100, 1200, 1370]).__next__)
    monkeypatch.setattr("mica.cli.adapt.callbacks.time", clock)
    pace = Pace()
    hooks = begun(pace=pace, blocks=100)
    pace.measured(1000.0)  # before the first step
    for step in (10, 20, 37):
        hooks.on_log(ARGS, state(step), None, logs={"learning_rate": 1e-3, "loss": 2.5})
    said = [line.split(", ")[2] for line in capsys.readouterr().err.splitlines()]
    # 30 blocks in 100 s: 88 more, and two measurements. 60 in 200 s: 58 more, and that of this step and the
    # last one. 109 in 370 s: 9 more, and the last measurement.
    assert said == ["38:13 left", "36:33 left", "17:10 left"]


def test_the_last_step_is_evaluated():
    assert not at_step(begun(), 39).should_evaluate
    assert at_step(begun(), 40).should_evaluate


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_are_checked_where_they_are_saved(name):
    hooks = begun()
    layer = torch.nn.Linear(2, 2)
    getattr(layer, name).data.view(-1)[-1] = math.inf
    at_step(hooks, model=layer)
    with pytest.raises(UsageError, match="a trained weight is not finite after step 10"):
        at_step(hooks, model=layer, should_save=True)
    getattr(layer, name).requires_grad_(False)  # the base's own weights are not the run's business
    at_step(hooks, model=layer, should_save=True)


def test_every_process_marks():
    calls = []
    for main in (True, False):
        begun(main, calls).on_save(ARGS, state(main=main), None)
    assert calls == [10, 10]


def send(*signums):
    for signum in signums:
        os.kill(os.getpid(), signum)  # Python runs the handler before the call returns to bytecode


@pytest.mark.parametrize("speaks", [True, False])
def test_a_request_is_noted_once_and_announced_once(speaks, capfd):
    before = [signal.getsignal(signum) for signum in SIGNALS]
    request = Request(alone=False, speaks=speaks)
    with request.heeded():
        assert request.signum == 0
        send(TERM, INT, INT, TERM)
    assert request.signum == TERM
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    said = "\nmica adapt: SIGTERM: finishing this step and saving a checkpoint\n"
    assert capfd.readouterr().err == said * speaks


def test_a_second_ctrl_c_stops_at_once_but_no_second_sigterm(capfd):
    request = Request(alone=True, speaks=True)
    with request.heeded():
        send(INT, TERM)
        with pytest.raises(KeyboardInterrupt):
            send(INT)
    assert request.signum == INT
    assert capfd.readouterr().err.endswith("; Ctrl-C again stops at once\n")


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(INT, signal.SIG_IGN)  # nohup does so
    try:
        with Request(alone=True, speaks=True).heeded() as request:
            send(INT)
        assert request.signum == 0
    finally:
        signal.signal(INT, before)
