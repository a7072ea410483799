"""The static gate refuses what it should: launches that are bad in one known way each, and a good one."""

import json
import re
import subprocess
import sys

import pytest

from tests.support.processes import ROOT, outside, start

SCRIPT = """
import json, sys, torch
import triton.language as tl
from tests import static_gate
from tests.support.static_cases import BF16, FP32, Case, empty
from mica.kernels.configs import Config
from mica.kernels.down_projection import down_projection
from mica.kernels.grad_a import grad_a
from mica.kernels.up_projection import up_projection_

def skinny(rank, config, dtype=BF16, width=4096, target="sm_90"):
    x, a = empty(8192, width, dtype=dtype), empty(rank, width, dtype=FP32)
    return down_projection.plan(x, a, target=target).bind(config and Config(*config))[1]

def gradient():
    return grad_a.plan(empty(8192, 16), empty(8192, 4096), rank=16, target="sm_90").bind()[1]

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
    "good on AMD": ("gfx942", skinny(16, None, target="gfx942")),
    "spills on AMD": ("gfx942", skinny(256, (256, 0, 64, 4, 1), target="gfx942")),
    "shared memory on AMD": ("gfx942", skinny(64, (128, 0, 256, 8, 2), target="gfx942")),
}
faults = {}
for name, (target, launch) in cases.items():
    faults[name] = static_gate.examine(target, Case(name, name, launch), {})[1].faults
shifted = Case("shifted", "shifted", skinny(16, None), shifted=("x_ptr",))
faults["narrow where the address is shifted"] = static_gate.examine("sm_90", shifted, {})[1].faults
x_first, x_second = gradient(), gradient()
x_second.meta["X_FIRST"] = False
for name, launch in (("good with x first", x_first), ("x is not first", x_second)):
    case = Case("grad_a", name, launch, is_asynchronous=True)
    faults[name] = static_gate.examine("sm_90", case, {})[1].faults
print(json.dumps(faults))
"""


@pytest.fixture(scope="module")
def faults():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=outside(), capture_output=True, text=True
    )
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
        ("spills on AMD", "bytes of scratch memory"),
        ("shared memory on AMD", "bytes of shared memory"),
        ("x is not first", "no product of four warps"),
        ("x is not first", "synchronous loads"),
    ],
)
def test_a_bad_launch_is_refused(faults, case, fault):
    assert any(fault in text for text in faults[case]), faults[case]


@pytest.mark.parametrize("case", ["good", "good on AMD", "good with x first"])
def test_a_good_launch_passes(faults, case):
    assert not faults[case]


def test_the_page_shows_the_latest_table():
    """Registers and shared memory in kernels/README.md are lines of the committed result."""
    page = (ROOT / "kernels/README.md").read_text()
    (shown,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    (path,) = re.findall(r"\(\.\./(bench/results/static/triton-[\d.]+txt)\)", page)
    assert set(shown.splitlines()) <= set((ROOT / path).read_text().splitlines())


def test_it_does_not_pretend_to_compile_interpreted_kernels():
    done = start("tests.static_gate", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stderr
