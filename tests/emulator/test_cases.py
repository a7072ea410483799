"""What `make emulate` covers, against what the static gate compiles."""

import re

import pytest

from tests.emulator import training_steps
from tests.emulator.cases import KERNELS, TARGETS, cases
from tests.emulator.drawn import drawn
from tests.support import static_cases


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_and_configuration_of_the_static_gate_is_run(target):
    compiled = {(case.kernel, _configuration(case.label)) for case in static_cases.cases(target)}
    every = list(cases(target))
    run = {(case.kernel, tuple(case.options.get("config", ())) or None) for case in every}
    assert not compiled - run
    assert {case.kernel for case in every} == {case.kernel for case in every if case.is_quick}


@pytest.mark.parametrize("name", training_steps.CASES)
def test_models_of_training_steps_are_built(name):
    """Their steps are run by `make emulate` with ``--all`` only."""
    _, step = training_steps.built(name)
    assert step()[0].isfinite().all()


def _configuration(label: str) -> tuple[int, ...] | None:
    found = re.search(r"\(([\d, ]+)\)", label)
    return found and tuple(map(int, found[1].split(",")))


def test_everything_is_drawn():
    found = list(drawn("sm_90", 0, 400))
    options = [case.options for case in found]
    assert {case.kernel for case in found} == set(KERNELS)
    assert {bool(own.get("dropout")) for own in options} == {False, True}
    assert {own["config"] is None for own in options} == {False, True}
    assert any(own["rank"] > 128 for own in options)
    assert any(own.get("tokens", 0) > 300 for own in options)
    assert any(0 in own["route"][1] for own in options if "route" in own)  # the first expert has no rows
