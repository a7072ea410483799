"""The static gate refuses what it should: launches that are bad in one known way each, and a good one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.static_cases import TARGETS, cases

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys, torch
from tests import static_gate
from tests.support.static_cases import BF16, FP32, Case, empty
from mica.kernels.configs import Config
from mica.kernels.down_projection import plan_down_projection
from mica.kernels.embedding import plan_grad_a_embedding
from mica.kernels.up_projection import plan_up_projection

def skinny(rank, config, dtype=BF16, width=4096, target="sm_90"):
    x, a = empty(8192, width, dtype=dtype), empty(rank, width, dtype=FP32)
    return plan_down_projection(x, a, config=config and Config(*config), target=target).bound()[1]

y, h, a = empty(8192, 4095, dtype=BF16), empty(8192, 16, dtype=BF16), empty(16, 4095, dtype=FP32)
scatter = plan_grad_a_embedding(empty(64, 16, dtype=FP32), empty(64, dtype=torch.int64), 16, 100).bound()[1]
broken = skinny(16, None)
del broken.args["x_ptr"]
cases = {
    "good": ("sm_90", skinny(16, None)),
    "good on AMD": ("gfx942", skinny(16, None, target="gfx942")),
    "spills": ("sm_90", skinny(256, (64, 0, 64, 4, 2), FP32)),
    "spills on AMD": ("gfx942", skinny(256, (128, 0, 64, 4, 1), FP32, target="gfx942")),
    "shared memory": ("sm_89", skinny(64, (128, 0, 128, 8, 4))),
    "narrow in a loop": ("sm_90", skinny(16, None, width=4095)),
    "narrow in a loop on AMD": ("gfx942", skinny(16, None, width=4095, target="gfx942")),
    "narrow in a tile": ("sm_90", plan_up_projection(y, h, a, target="sm_90").bound()[1]),
    "no product": ("sm_90", scatter),
    "does not compile": ("sm_90", broken),
}
faults = {}
for name, (target, launch) in cases.items():
    aligned = name != "no product"
    faults[name] = static_gate.examine(target, Case(name, name, launch, is_aligned=aligned), {})[1].faults
print(json.dumps(faults))
"""


@pytest.fixture(scope="module")
def faults():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("spills", "spills or a stack"),
        ("spills on AMD", "spills or a stack"),
        ("shared memory", "bytes of shared memory"),
        ("narrow in a loop", "narrow global accesses"),
        ("narrow in a loop on AMD", "narrow global accesses"),
        ("narrow in a tile", "narrow global accesses"),
        ("no product", "no tensor-core instruction"),
        ("does not compile", "does not compile"),
    ],
)
def test_a_bad_launch_is_refused(faults, case, fault):
    assert any(fault in text for text in faults[case]), faults[case]


@pytest.mark.parametrize("case", ["good", "good on AMD"])
def test_a_good_launch_passes(faults, case):
    assert not faults[case]


def test_a_launch_that_follows_another_is_seen_where_it_is_made():
    targets = {target for target in TARGETS for case in cases(target) if case.kernel == "add_parts"}
    assert targets == {"gfx942"}


def test_it_does_not_pretend_to_compile_interpreted_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.static_gate"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stderr
