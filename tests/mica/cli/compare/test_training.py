"""The stops of a training of `mica compare`; whole trainings are in test_session.py."""

import math
from types import SimpleNamespace

from transformers import TrainerControl

from mica.cli.compare.training import _Stops


def after_step(stops: _Stops, step: int) -> TrainerControl:
    control = TrainerControl()
    stops.on_step_end(None, SimpleNamespace(global_step=step), control, model=None)
    return control


def test_it_is_measured_at_its_stops_only():
    seen = []
    stops = _Stops([2, 4], lambda model: {"validation": [1.0, 2.0]}, lambda: seen.append(1))
    controls = [after_step(stops, step) for step in range(1, 5)]
    assert [point["step"] for point in stops.points] == [2, 4]
    assert stops.blocks == 4
    assert len(seen) == 4
    assert stops.failed is None
    assert not any(control.should_training_stop for control in controls)


def test_a_loss_that_is_not_finite_ends_the_training():
    """The steps that are left would cost as much, and tell nothing."""
    stops = _Stops([1, 2], lambda model: {"validation": [1.0], "retained": [1.0, math.nan]}, lambda: None)
    assert after_step(stops, 1).should_training_stop
    assert stops.failed == "diverged: loss on the retained text nan after step 1"
    assert stops.points == []
