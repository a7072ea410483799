"""Suites as a run starts them: a fault is attributed to what has it alone; all else gets its number.

The dry run of `bench.gpu` starts the others (`tests/bench/gpu/test_dry_run.py`).
"""

import re

import pytest
import torch

from bench.results import names
from bench.results.names import (
    BARE,
    DEVICE_TIME,
    FAST,
    GRAPH,
    KERNELS,
    MICA,
    PLAIN_LORA,
    PYTHON,
    STOCK,
    STOCK_16,
    STOCK_UNCAST,
    WALL,
)
from bench.suites.bench_kernels import launch_bytes
from mica.kernels.configs import FORM_NAMES
from mica.kernels.down_projection import down_projection
from mica.kernels.up_projection import up_projection_
from tests.support.dry_run import CELL, dry_run

MORE = "bench_block or (bench_step and autocast) or (r16 and backward and not forms and not dropout)"
ON_A_CPU = {"MICA_BENCH_SIZE": "default", "TRITON_INTERPRET": "0", "MICA_BACKEND": "auto"}
ALL = {BARE, STOCK, STOCK_16, FAST}


@pytest.mark.slow
def test_every_implementation_on_a_cpu_is_timed(tmp_path):
    """Also kernels that are not launched."""
    done = dry_run(tmp_path, "bench_host.py", "-k", "float32 and backward", **ON_A_CPU)
    assert done.code == 0, done.text
    host = done.result.groups
    suites = ["host layer", "host layer, without products", "host block"]
    assert [group.axes["suite"] for group in host] == [suite for suite in suites for _ in (MICA, PLAIN_LORA)]
    for group in host:
        assert [*group.timings] == [BARE, STOCK, FAST, PYTHON, KERNELS]
        assert [name for name, timing in group.timings.items() if timing.facts["launches"]] == [KERNELS]


@pytest.mark.slow
def test_every_implementation_on_a_gpu_is_timed(tmp_path):
    """By every clock, and compiled."""
    done = dry_run(tmp_path, "bench_block.py bench_step.py bench_layer.py", "-k", MORE)
    assert done.code == 0, done.text
    assert not done.result.refused
    block = [*done.result.select(suite="block")]
    assert [group.axes["clock"] for group in block] == [WALL, DEVICE_TIME, GRAPH]
    for group in block:
        assert group.timings.keys() == ALL
    for group in done.result.select(suite="step", how="autocast"):
        assert group.timings.keys() == {BARE, STOCK, STOCK_UNCAST, FAST}
    compiled = {names.COMPILED, names.COMPILED_FAST}
    layers = done.result.select(suite="layer")
    timed = {group.axes.get("compiler"): {*group.timings} for group in layers}
    assert timed == {None: ALL, "torch.compile": ALL | compiled}


@pytest.mark.slow
def test_a_wrong_operator_gets_no_number_and_the_others_do(tmp_path):
    """Nor has it a row in the table."""
    injected = "from tests.support import broken_operator"
    selection = f"{CELL} and backward"
    done = dry_run(tmp_path, "bench_layer.py", "-k", selection, injected=injected, **ON_A_CPU)
    assert done.code == 1, done.text
    (layer,) = done.result.groups
    assert {BARE, STOCK} <= layer.timings.keys()
    assert {*re.findall(r"^(\S.*?) +[\d.,]+ tokens/s ", done.text, re.MULTILINE)} == {*layer.timings}
    (refused,) = done.result.refused
    assert refused["implementation"] == FAST
    assert refused["why"].startswith("the relative error of y is 1.0")
    assert FAST not in layer.timings


def test_the_bytes_of_a_launch():
    base, h, factor = torch.zeros(20, 24), torch.zeros(20, 16), torch.zeros(16, 24)
    out, launch = up_projection_.plan(base, h, factor).bind()
    assert launch_bytes(launch, out) == 4 * (2 * 20 * 24 + 20 * 16 + 16 * 24)
    x, factor = torch.zeros(20, 4096), torch.zeros(16, 4096)
    out, launch = down_projection.plan(x, factor).bind()
    assert launch.args["partial_ptr"] is not None  # parts need not be
    assert launch_bytes(launch, out) == 4 * (20 * 4096 + 16 * 4096 + 20 * 16)


# At rank 32 the forward takes the split form whatever is chosen.
BYPASSED = """
from mica.paths import choose

decide = choose.choice_of

def bypassed(function, device, rank, *others):
    choice = decide(function, device, rank, *others)
    is_bypassed = (function, rank) == ("linear", 32) and choice.form != "reference"
    return choice._replace(form="split") if is_bypassed else choice

choose.choice_of = bypassed
"""


@pytest.mark.slow
def test_a_form_that_was_not_taken_is_refused(tmp_path):
    done = dry_run(tmp_path, "bench_layer.py", "-k", "forms", injected=BYPASSED)
    forms = {names.of_form(word) for word in FORM_NAMES}
    refused = {one["implementation"]: one["why"] for one in done.result.refused}
    taken_anyway = {FAST, names.of_form("reference")}
    assert refused.keys() == forms - taken_anyway, done.text
    assert len(done.result.groups) == 3 * 6  # two passes, three clocks
    for group in done.result.groups:
        wrong = refused.keys() if group.axes["rank"] == 32 else set()
        assert group.timings.keys() == {BARE, *forms} - wrong, group.name
    assert refused[names.of_form("fused")].startswith("launched {'down_projection': 2, 'up_projection': 1, ")
