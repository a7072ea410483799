"""A few of the trials of `make kills`."""

import pytest

from tests.kills import ADAPT, TRANSFER, Inputs, Trial

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs():
    made = Inputs()
    yield made
    made.close()


@pytest.mark.parametrize("command", [ADAPT, TRANSFER])
def test_nothing_is_lost(inputs, command):
    trials = [Trial(number, inputs, command) for number in range(5)]
    for trial in trials:
        trial.run()
        assert not trial.faults, "\n".join([*trial.story, *trial.faults])
    assert sum(trial.kills for trial in trials) > 2
