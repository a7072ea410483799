"""The static gate refuses what it should: launches that are bad in one known way each, and a good one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys, torch
import triton.language as tl
from tests import static_gate
from tests.support.static_cases import BF16, FP32, Case, empty
from mica.kernels.configs import Config
from mica.kernels.down_projection import down_projection
from mica.kernels.up_projection import up_projection_

def skinny(rank, config, dtype=BF16, width=4096, target="sm_90"):
    x, a = empty(8192, width, dtype=dtype), empty(rank, width, dtype=FP32)
    return down_projection.plan(x, a, target=target).bind(config and Config(*config))[1]

y, h, a = empty(8192, 4095), empty(8192, 16), empty(16, 4095, dtype=FP32)
broken, without = skinny(16, None), skinny(16, None)
del broken.args["x_ptr"]
without.meta["PRECISION"], without.meta["COMPUTE"] = "ieee", tl.float32
cases = {
    "good": ("sm_90", skinny(16, None)),
    "spills": ("sm_90", skinny(256, (64, 0, 64, 4, 2), FP32)),
    "shared memory": ("sm_89", skinny(64, (128, 0, 128, 8, 4))),
    "narrow in a loop": ("sm_90", skinny(16, None, width=4095)),
    "narrow in a tile": ("sm_90", up_projection_.plan(y, h, a, target="sm_90").bind()[1]),
    "no product": ("sm_90", without),
    "does not compile": ("sm_90", broken),
}
faults = {}
for name, (target, launch) in cases.items():
    faults[name] = static_gate.examine(target, Case(name, name, launch), {})[1].faults
shifted = Case("shifted", "shifted", skinny(16, None), shifted=("x_ptr",))
faults["narrow where the address is shifted"] = static_gate.examine("sm_90", shifted, {})[1].faults
print(json.dumps(faults))
"""


@pytest.fixture(scope="module")
def faults():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("spills", "spills or a stack"),
        ("shared memory", "bytes of shared memory"),
        ("narrow in a loop", "narrow global accesses"),
        ("narrow where the address is shifted", "narrow global accesses"),
        ("narrow in a tile", "narrow global accesses"),
        ("no product", "no tensor-core instruction"),
        ("does not compile", "does not compile"),
    ],
)
def test_a_bad_launch_is_refused(faults, case, fault):
    assert any(fault in text for text in faults[case]), faults[case]


def test_a_good_launch_passes(faults):
    assert not faults["good"]


def test_it_does_not_pretend_to_compile_interpreted_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.static_gate"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stderr
