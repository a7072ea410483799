"""What is measured after a training of `mica compare`; whole trainings are in test_session.py."""

import math
from types import SimpleNamespace

import pytest

from mica.cli.compare import training


def test_the_first_step_is_not_timed():
    """It fills caches."""
    clock = training._Clock()
    began = []
    for step in range(1, 5):
        clock.on_step_end(None, SimpleNamespace(global_step=step), None)
        began.append(clock.began)
    assert clock.steps == 3
    assert {*began} == {began[0]} != {0.0}


@pytest.mark.parametrize(("loss", "failed"), [(math.nan, True), (math.inf, True), (2.0, False)])
def test_a_loss_that_is_not_finite_is_seen(loss, failed, monkeypatch):
    losses = iter([SimpleNamespace(loss=1.0), SimpleNamespace(loss=loss)])
    monkeypatch.setattr(training.evaluation, "likelihood", lambda *args: next(losses))
    measured = training.measure(None, {"validation": [0], "retained": [0]})
    if failed:
        assert measured == {"losses": {}, "failed": training.DIVERGED}
    else:
        assert measured == {"losses": {"validation": [1.0], "retained": [2.0]}, "failed": None}
