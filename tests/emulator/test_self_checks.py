"""The emulator itself, in processes of its own: Triton interprets kernels in this one."""

import functools
import json

import pytest
import triton

from tests.emulator.self_checks import CHECKS
from tests.support.processes import start

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith("3.9."), reason="the emulator knows what Triton 3.9 generates"
)


@functools.cache
def report(capability: int) -> dict[str, str]:
    process = start("tests.emulator.self_checks", capability, OMP_NUM_THREADS="1")
    assert not process.returncode, process.stderr
    return json.loads(process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_the_emulator_runs_and_refuses_small_kernels(capability, check):
    assert report(capability)[check] == ""
