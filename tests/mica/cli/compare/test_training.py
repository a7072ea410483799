"""What is measured after a training of `mica compare`; whole trainings are in test_session.py."""

import math
from types import SimpleNamespace

import pytest

from mica.cli.compare.training import _Watch, not_finite


def test_the_first_step_is_not_timed():
    """It fills caches."""
    seen = []
    watch = _Watch(lambda: seen.append(1))
    begun = []
    for step in range(1, 5):
        watch.on_step_end(None, SimpleNamespace(global_step=step), None)
        begun.append(watch.began)
    assert watch.steps == 3
    assert len(seen) == 4
    assert len(set(begun)) == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named(loss):
    measured = {"validation": [1.0], "retained": [1.0, loss]}
    assert not_finite(measured) == "the loss on the retained text is not finite"
    assert not_finite({"validation": [1.0], "retained": [1.0]}) is None
    assert not_finite({}) is None
