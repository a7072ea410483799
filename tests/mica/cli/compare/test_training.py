"""What is measured after a training of `mica compare`; whole trainings are in test_session.py."""

import math
from types import SimpleNamespace

import pytest

from mica.cli.compare.training import _Watch, is_finite


def test_the_first_step_is_not_timed():
    """It fills caches."""
    seen = []
    watch = _Watch(lambda: seen.append(watch.began))
    for step in range(1, 5):
        watch.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert watch.steps == 3
    assert seen == [0.0, *[watch.began] * 3]


@pytest.mark.parametrize(("loss", "is_fine"), [(math.nan, False), (math.inf, False), (2.0, True)])
def test_a_loss_that_is_not_finite_is_seen(loss, is_fine):
    assert is_finite({"validation": [1.0], "retained": [1.0, loss]}) == is_fine
