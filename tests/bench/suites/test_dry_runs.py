"""Suites as a run starts them: a fault is attributed to what has it alone; all else gets its number."""

import pytest
import torch

from bench.results import names
from bench.results.names import (
    ATEN,
    BARE,
    COPY,
    DESCRIPTOR,
    DEVICE_TIME,
    FAST,
    FUSED,
    GRAPH,
    KERNELS,
    MIXED,
    PYTORCH,
    STOCK,
    STOCK_16,
    WALL,
)
from bench.suites.bench_kernels import NAMES, launch_bytes
from mica.kernels.down_projection import down_projection
from mica.kernels.up_projection import up_projection_
from tests.support.dry_run import dry_run

pytestmark = pytest.mark.slow

# Patches the binding of every launch; kernels are told apart by the names of their first parameters.
BROKEN = """
from mica.kernels import launching

bind = launching.Plan.bind

def broken(plan, tensors):
    launch, first = bind(plan, tensors), tuple(plan.kernel.arg_names[:2])
    {}
    return launch

launching.Plan.bind = broken
"""
LAYER = "(bench_layer and 1024x576x576-r16-bfloat16 and backward)"
HOST = "(bench_host and not generation and float32 and backward)"


def test_every_implementation_is_timed(measured):
    """Kernels are timed that are not launched; all of a block's by every clock."""
    code, result, output = measured(["bench_host.py"], HOST)
    assert code == 0, output
    assert [group.axes["suite"] for group in result.groups] == ["host layer", "host block"]
    for group in result.groups:
        launches = {name: timing.facts["launches"] for name, timing in group.timings.items()}
        assert {name for name, count in launches.items() if count} == {KERNELS}
        assert {PYTORCH, STOCK} <= launches.keys()
    dry = {"MICA_BENCH_SIZE": "dry", "TRITON_INTERPRET": "1", "MICA_BACKEND": "triton"}
    code, result, output = measured(["bench_block.py"], **dry)
    assert code == 0, output
    assert not result.refused
    assert [group.axes["clock"] for group in result.groups] == [WALL, DEVICE_TIME, GRAPH]
    assert all(group.timings.keys() == {BARE, STOCK, STOCK_16, FAST} for group in result.groups)


def test_a_wrong_operator_gets_no_number_and_the_others_do(measured):
    code, result, output = measured(["bench_layer.py", "bench_host.py"], f"{LAYER} or {HOST}", "wrong")
    assert code == 1, output
    layer, host_layer, host_block = result.groups
    assert layer.axes["suite"] == "layer"
    assert {BARE, STOCK, STOCK_16, ATEN, names.LORA} <= layer.timings.keys()
    assert {BARE, STOCK, ATEN, KERNELS} <= host_layer.timings.keys()
    assert {BARE, STOCK, KERNELS} <= host_block.timings.keys()
    assert [one["implementation"] for one in result.refused] == [FAST, PYTORCH, PYTORCH]
    assert not any(group.timings.keys() & {FAST, PYTORCH} for group in result.groups)
    of_layer, _, of_block = (one["why"] for one in result.refused)
    assert of_layer.startswith("the relative error of y is 1.0")
    assert of_block.startswith("y is ")


@pytest.mark.parametrize(
    ("fault", "selection", "failed", "why"),
    [
        (
            'if first == ("g_ptr", "x_ptr"): launch.args["scale"] *= 1.05',
            "test_kernel or test_operator",
            {*(f"test_kernel[grad_a-{shape}]" for shape in ("aligned", "odd", "fp32")), "test_operator"},
            ("test_kernel[grad_a-aligned]", "the relative error of grad_a is 5.00e-02"),
        ),
        (  # output is left unwritten; one token has one tile
            'launch.grid = (1, 1) if first == ("x_ptr", "p_ptr") else plan.grid',
            "down-A-odd or down-A-one",
            {"test_kernel[down-A-odd]"},
            ("test_kernel[down-A-odd]", "the relative error of down-A is inf"),
        ),
    ],
)
def test_a_wrong_kernel_fails_its_check(tmp_path, fault, selection, failed, why):
    done = dry_run(tmp_path, "check_kernels.py", "-k", selection, injected=BROKEN.format(fault))
    assert {name for name, outcome in done.outcomes.items() if outcome == "failed"} == failed, done.text
    assert set(done.outcomes.values()) == {"passed", "failed"}
    assert why[1] in done.whys[why[0]]
    assert {check["name"].partition("::")[2] for check in done.result.checks} == done.outcomes.keys()


def test_a_configuration_is_refused_alone(tmp_path):
    """One of two kernels gives wrong numbers, one of another cannot be launched."""
    breaking = """
    if plan.config[0] == 64 and first == ("x_ptr", "p_ptr"):
        launch.args["scale"] *= 1.05
    if plan.config[0] == 16 and first == ("base_ptr", "out_ptr"):
        raise RuntimeError("out of something")
    """
    result = dry_run(tmp_path, "bench_kernels.py", injected=BROKEN.format(breaking.strip())).result
    refused = {one["implementation"]: one["why"] for one in result.refused}
    kernels = {name.partition(", ")[0] for name in refused}
    assert kernels == {NAMES[key] for key in ("down-A", "down-B", "up-B")}
    for name, why in refused.items():
        word = "out of something" if name.startswith(NAMES["up-B"]) else "the relative error is 5.0"
        assert word in why, (name, why)
    assert not {name for group in result.groups for name in group.timings} & refused.keys()
    for key, kernel in NAMES.items():
        groups = list(result.select(suite="kernels", kernel=kernel))
        assert {group.axes["clock"] for group in groups} == {WALL, DEVICE_TIME, GRAPH}
        assert all({COPY} < group.timings.keys() for group in groups), key
    for group in result.select(suite="kernels", clock=WALL):
        (size,) = {timing.facts["bytes"] for timing in group.timings.values()}  # those of the copy
        assert size >= 2 * group.axes["tokens"] * group.axes["features"]


def test_the_bytes_of_a_launch():
    base, h, factor = torch.zeros(20, 24), torch.zeros(20, 16), torch.zeros(16, 24)
    out, launch = up_projection_.plan(base, h, factor).bind()
    assert launch_bytes(launch, out) == 4 * (2 * 20 * 24 + 20 * 16 + 16 * 24)
    x, factor = torch.zeros(20, 4096), torch.zeros(16, 4096)
    out, launch = down_projection.plan(x, factor).bind()
    assert launch.args["partial_ptr"] is not None  # parts need not be
    assert launch_bytes(launch, out) == 4 * (20 * 4096 + 16 * 4096 + 20 * 16)


# The forward takes the split form whatever is chosen; and another form is wrong.
BYPASSED = """
from bench.suites import layer
from mica.kernels import configs

forms_of = configs.forms_of
configs.forms_of = lambda *args: forms_of(*args)._replace(forward="split")
backward = layer.AtenControl.backward
layer.AtenControl.backward = staticmethod(lambda ctx, dy: backward(ctx, dy * 1.02))
"""


@pytest.mark.parametrize("injected", ["", BYPASSED], ids=["right", "bypassed"])
def test_a_form_that_was_not_taken_is_refused(tmp_path, injected):
    done = dry_run(tmp_path, "bench_forms.py", injected=injected)
    refused = {one["implementation"]: one["why"] for one in done.result.refused}
    wrong = {FUSED, DESCRIPTOR, ATEN} if injected else set()
    assert refused.keys() == wrong, done.text
    assert len(done.result.groups) == 6  # two passes, three clocks
    timed = {BARE, FAST, MIXED, FUSED, DESCRIPTOR, PYTORCH, ATEN} - wrong
    assert all(group.timings.keys() == timed for group in done.result.groups)
    if injected:
        assert "calls of the fused kernel, by descriptors or not: Counter({False: 1})" in refused[FUSED]
        assert "Counter({True: 1})" in refused[DESCRIPTOR]
        assert "the relative error of dx is 2.0" in refused[ATEN]


# Each call of a layer draws another seed, and a compiled one gives 2 % too much.
WRONG_STREAMS = """
import os
import torch
from mica.fast.forward import decide

def dropout(p, x):
    seed = torch.tensor([int.from_bytes(os.urandom(7), "big")]) if p else None
    return (p, seed)

decide.dropout = dropout

compile = torch.compile

def broken(module, **options):
    compiled = compile(module, **options)
    return lambda x: compiled(x) * 1.02

torch.compile = broken
"""


def test_the_check_of_streams_reports_what_is_wrong_and_what_needs_a_gpu(tmp_path):
    done = dry_run(tmp_path, "check_streams.py", injected=WRONG_STREAMS)
    by_outcome = {
        outcome: {name for name, one in done.outcomes.items() if one == outcome}
        for outcome in ("skipped", "failed")
    }
    compiled = {f"test_compile_fullgraph[{how}-{rank}]" for how in ("eager", "aot_eager") for rank in (4, 16)}
    assert by_outcome["failed"] == compiled | {"test_a_checkpoint_draws_the_same_mask"}
    assert "a checkpointed layer: other bits of" in done.whys["test_a_checkpoint_draws_the_same_mask"]
    assert "call 0: y is 2.0" in done.whys["test_compile_fullgraph[eager-16]"]
    assert len(by_outcome["skipped"]) == len(done.outcomes) - len(by_outcome["failed"]) == 13
    assert all("needs a GPU" in done.whys[name] for name in by_outcome["skipped"])


def test_nothing_passes_without_kernels(tmp_path):
    disabled = "import mica.fast\nmica.fast.disable()"
    done = dry_run(tmp_path, "check_streams.py", "-k", "checkpoint", injected=disabled)
    assert set(done.outcomes.values()) == {"failed"}
