"""What is measured after a training, and on which blocks; whole trainings are in test_session.py."""

import math
from types import SimpleNamespace

import pytest

from mica.cli.compare import trainings


@pytest.mark.parametrize(
    ("documents", "chosen"),
    [
        ([1, 1, 2, 2, 3, 3, 4, 4], [0, 1]),
        ([4, 4, 3, 3, 2, 2, 1, 1], [6, 7]),  # whatever their order
        ([5, 5, 5, 5, 5, 7, 8, 9], [0, 4]),  # the first is too long
        ([1] * 8, [0, 4]),
    ],
)
def test_rates_are_chosen_by_documents_of_their_own(documents, chosen):
    assert trainings._for_choosing(documents) == chosen


def test_the_first_step_is_not_timed():
    """It fills caches."""
    clock = trainings._Clock()
    began = []
    for step in range(1, 5):
        clock.on_step_end(None, SimpleNamespace(global_step=step), None)
        began.append(clock.began)
    assert clock.steps == 3
    assert {*began} == {began[0]} != {0.0}


@pytest.mark.parametrize(("loss", "failed"), [(math.nan, True), (math.inf, True), (2.0, False)])
def test_a_loss_that_is_not_finite_is_seen(loss, failed, monkeypatch):
    losses = iter([SimpleNamespace(loss=1.0), SimpleNamespace(loss=loss)])
    monkeypatch.setattr(trainings.evaluation, "likelihood", lambda *args: next(losses))
    measured = trainings.measure(None, {"validation": [0], "retained": [0]})
    if failed:
        assert measured == {"losses": {}, "failed": trainings.DIVERGED}
    else:
        assert measured == {"losses": {"validation": [1.0], "retained": [2.0]}, "failed": None}
