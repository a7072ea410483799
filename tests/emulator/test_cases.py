"""What `make emulate` covers, against what the static gate compiles."""

import re

import pytest

from tests.emulator.cases import TARGETS, cases
from tests.support import static_cases


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_and_configuration_of_the_static_gate_is_run(target):
    compiled = {(case.kernel, _configuration(case.label)) for case in static_cases.cases(target)}
    every = list(cases(target))
    run = {(case.kernel, tuple(case.options.get("config", ())) or None) for case in every}
    assert not compiled - run
    assert {case.kernel for case in every} == {case.kernel for case in every if case.is_quick}


def _configuration(label: str) -> tuple[int, ...] | None:
    found = re.search(r"\(([\d, ]+)\)", label)
    return found and tuple(map(int, found[1].split(",")))
