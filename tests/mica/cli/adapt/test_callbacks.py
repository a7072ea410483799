"""The callback alone, with made-up states of a Trainer, and signals that this process sends to itself."""

import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from mica.cli.adapt.callbacks import Hooks, Request
from tests.support.adapt_runs import fresh_state  # noqa: F401 (a fixture)

ARGS = SimpleNamespace(
    learning_rate=3e-3, output_dir="nowhere", logging_steps=5, eval_steps=None, save_steps=5
)


def state(step, main=True):
    return TrainerState(global_step=step, max_steps=40, is_world_process_zero=main, log_history=["a"])


def begun(main=True):
    """Hooks of a run that has begun."""
    options = SimpleNamespace(keep_best=False, patience=None)
    hooks = Hooks(Request(alone=True, speaks=False), options)
    hooks.on_train_begin(ARGS, state(0, main), None)
    return hooks


@pytest.mark.parametrize("main", [True, False])
def test_progress(monkeypatch, main, capsys):
    """The time left is that of the steps since this session's first one, which was the tenth."""
    clock = SimpleNamespace(perf_counter=iter([5, 65, 125]).__next__)
    monkeypatch.setattr("mica.cli.adapt.callbacks.time", clock)
    hooks = begun(main)
    hooks.on_log(ARGS, state(0, main), None, logs={"eval_held_out_perplexity": 7.77})
    for step in (10, 11):
        hooks.on_step_begin(ARGS, state(step, main), None)
    for step in (20, 40):
        hooks.on_log(ARGS, state(step, main), None, logs={"learning_rate": 1e-3, "loss": 2.5})
    hooks.on_log(ARGS, state(40, main), None, logs={"train_loss": 2.5})  # the Trainer's own end
    expected = [
        "step 0/40: held-out perplexity 7.77",
        "step 20/40: loss 2.500, lr 1.00e-03, 02:00 left",
        "step 40/40: loss 2.500, lr 1.00e-03, 00:00 left",
    ]
    assert capsys.readouterr().err.splitlines() == (expected if main else [])


@pytest.mark.parametrize(("step", "is_last"), [(39, False), (40, True)])
def test_the_last_step_is_evaluated(step, is_last):
    control = TrainerControl()
    begun().on_step_end(ARGS, state(step), control, model=torch.nn.Linear(2, 2))
    assert control.should_evaluate == is_last


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup does so
    try:
        with Request(alone=True, speaks=True).heeded() as request:
            signal.raise_signal(signal.SIGINT)
        assert request.signum == 0
    finally:
        signal.signal(signal.SIGINT, before)
