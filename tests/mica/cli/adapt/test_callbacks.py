"""The callback alone, with made-up states of a Trainer, and signals that this process sends to itself."""

import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from mica.cli.adapt.callbacks import Hooks, Request


@pytest.mark.parametrize("main", [True, False])
def test_progress(monkeypatch, main, capsys):
    """The time left is that of the steps since this session's first one, which was the tenth."""
    clock = SimpleNamespace(perf_counter=iter([5, 65, 125]).__next__)
    monkeypatch.setattr("mica.cli.adapt.callbacks.time", clock)
    hooks = Hooks(Request(alone=True, speaks=False), None)

    def state(step):
        return TrainerState(global_step=step, max_steps=40, is_world_process_zero=main)

    hooks.on_log(None, state(0), None, logs={"eval_held_out_perplexity": 7.77})
    for step in (10, 11):
        hooks.on_step_begin(None, state(step), None)
    for step in (20, 40):
        hooks.on_log(None, state(step), None, logs={"learning_rate": 1e-3, "loss": 2.5})
    hooks.on_log(None, state(40), None, logs={"train_loss": 2.5})  # the Trainer's own end
    expected = [
        "step 0/40: held-out perplexity 7.77",
        "step 20/40: loss 2.500, lr 1.00e-03, 02:00 left",
        "step 40/40: loss 2.500, lr 1.00e-03, 00:00 left",
    ]
    assert capsys.readouterr().err.splitlines() == (expected if main else [])


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup does so
    try:
        with Request(alone=True, speaks=True).heeded() as request:
            signal.raise_signal(signal.SIGINT)
        assert request.signum == 0
    finally:
        signal.signal(signal.SIGINT, before)
