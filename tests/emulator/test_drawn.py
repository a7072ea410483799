"""Drawn cases can be repeated, and vary."""

import pytest

from tests.emulator.cases import KERNELS, TARGETS
from tests.emulator.drawn import drawn


def described(target, seed, count):
    return [(case.label, case.seed) for case in drawn(target, seed, count)]


@pytest.mark.parametrize("target", TARGETS)
def test_a_case_depends_on_target_seed_and_number_only(target):
    assert described(target, 7, 20) == described(target, 7, 40)[:20]
    assert not set(described(target, 7, 20)) & set(described(target, 8, 20))
    assert described(target, 7, 1)[0][0].startswith("drawn 0 of seed 7 ")


def test_everything_is_drawn():
    found = list(drawn("sm_90", 0, 400))
    options = [case.options for case in found]
    assert {case.kernel for case in found} == set(KERNELS)
    assert {bool(own.get("dropout")) for own in options} == {False, True}
    assert {own["config"] is None for own in options} == {False, True}
    assert any(own["rank"] > 128 for own in options)
    assert any(own.get("tokens", 0) > 300 for own in options)
    assert any(0 in own["route"][1] for own in options if "route" in own)  # the first expert has no rows
