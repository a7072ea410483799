"""Suites as a run starts them: a fault is attributed to what has it alone; all else gets its number."""

import pytest
import torch

from bench.results import names
from bench.results.names import ATEN, BARE, DEVICE_TIME, FAST, GRAPH, KERNELS, PYTHON, STOCK, STOCK_16, WALL
from bench.suites.bench_kernels import NAMES, launch_bytes
from mica.kernels.configs import FORM_NAMES
from mica.kernels.down_projection import down_projection
from mica.kernels.up_projection import up_projection_
from tests.support.dry_run import CELL, dry_run

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
LAYER = f"(bench_layer and {CELL} and backward)"
MORE = "bench_block or (bench_step and autocast) or (r16 and backward and not forms and not dropout)"
HOST = "(bench_host and block and float32 and backward)"
ON_A_CPU = {"MICA_BENCH_SIZE": "default", "TRITON_INTERPRET": "0", "MICA_BACKEND": "auto"}
ON_A_CPU |= {"MICA_TEST_OPERATOR": "wrong"}  # for the plugin that breaks operators


def test_every_implementation_is_timed(tmp_path):
    """Kernels that are not launched, all of a block's by every clock, and what is only on a GPU."""
    done = dry_run(tmp_path, "bench_host.py", "-k", "bench_host and float32 and backward", **ON_A_CPU)
    assert done.code == 0, done.text
    suites = [group.axes["suite"] for group in done.result.groups]
    assert suites == ["host layer", "host layer, without products", "host block"]
    for group in done.result.groups:
        assert group.timings.keys() == {BARE, STOCK, FAST, PYTHON, KERNELS}
        assert [name for name, timing in group.timings.items() if timing.facts["launches"]] == [KERNELS]
    (tmp_path / "journal.jsonl").unlink()
    done = dry_run(tmp_path, "bench_block.py bench_step.py bench_layer.py", "-k", MORE)
    assert done.code == 0, done.text
    assert not done.result.refused
    block, layer = ([*done.result.select(suite=suite)] for suite in ("block", "layer"))
    assert [group.axes["clock"] for group in block] == [WALL, DEVICE_TIME, GRAPH]
    assert all(group.timings.keys() == {BARE, STOCK, STOCK_16, FAST} for group in block)
    steps = {group.axes.get("how"): {*group.timings} for group in done.result.select(suite="step")}
    assert steps == {"autocast": {BARE, STOCK, STOCK_16, FAST}}
    compiled = {names.COMPILED, names.COMPILED_FAST, names.COMPILED_PLAIN}
    baselines = {BARE, STOCK, STOCK_16}
    timed = {group.axes.get("compiler"): {*group.timings} for group in layer}
    assert timed == {None: {*baselines, ATEN, FAST}, "torch.compile": {*baselines, FAST, *compiled}}


def test_a_wrong_operator_gets_no_number_and_the_others_do(tmp_path):
    selection, injected = f"{LAYER} or {HOST}", "from tests.support import broken_operator"
    done = dry_run(tmp_path, "bench_layer.py bench_host.py", "-k", selection, injected=injected, **ON_A_CPU)
    assert done.code == 1, done.text
    layer, host = done.result.groups
    assert layer.axes["suite"] == "layer"
    assert {BARE, STOCK, ATEN} <= layer.timings.keys()
    assert {BARE, STOCK, KERNELS} <= host.timings.keys()
    assert FAST not in layer.timings
    assert not {FAST, PYTHON} & host.timings.keys()
    of_layer, *of_host = done.result.refused
    assert of_layer["implementation"] == FAST
    assert of_layer["why"].startswith("the relative error of y is 1.0")
    assert [refused["implementation"] for refused in of_host] == [FAST, PYTHON]
    assert all(refused["why"].startswith("y is ") for refused in of_host)


def test_a_wrong_kernel_fails_its_check(tmp_path):
    """One scales its result, one leaves most tiles unwritten (a single token has one tile)."""
    breaking = """
    if first == ("g_ptr", "x_ptr"):
        launch.args["scale"] *= 1.05
    if first == ("x_ptr", "p_ptr") and tensors[0].dtype == torch.float16:
        launch.grid = (1, 1)
    """
    fault = "import torch\n" + BROKEN.format(breaking.strip())
    done = dry_run(tmp_path, "test_kernels.py", "-k", "test_kernel or test_operator", injected=fault)
    scaled = {f"test_kernel[grad_a-{shape}]" for shape in ("aligned", "odd", "fp32")}
    failed = {name for name, outcome in done.outcomes.items() if outcome == "failed"}
    assert failed == {*scaled, "test_operator", "test_kernel[down-A-odd]"}, done.text
    assert set(done.outcomes.values()) == {"passed", "failed"}
    assert "the relative error of grad_a is 5.00e-02" in done.whys["test_kernel[grad_a-aligned]"]
    assert "the relative error of down-A is inf" in done.whys["test_kernel[down-A-odd]"]
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
        assert all({names.COPY, names.CUBLAS} < group.timings.keys() for group in groups), key
    for group in result.select(suite="kernels", clock=WALL):
        (size,) = {timing.work["bytes"] for timing in group.timings.values()}  # those of the copy
        assert size >= 2 * group.axes["tokens"] * group.axes["features"]


def test_the_bytes_of_a_launch():
    base, h, factor = torch.zeros(20, 24), torch.zeros(20, 16), torch.zeros(16, 24)
    out, launch = up_projection_.plan(base, h, factor).bind()
    assert launch_bytes(launch, out) == 4 * (2 * 20 * 24 + 20 * 16 + 16 * 24)
    x, factor = torch.zeros(20, 4096), torch.zeros(16, 4096)
    out, launch = down_projection.plan(x, factor).bind()
    assert launch.args["partial_ptr"] is not None  # parts need not be
    assert launch_bytes(launch, out) == 4 * (20 * 4096 + 16 * 4096 + 20 * 16)


# At rank 32 the forward takes the split form whatever is chosen; and the control is wrong.
BYPASSED = """
from bench.suites import layer
from mica.kernels import configs

forms_of = configs.forms_of

def bypassed(*args):
    return forms_of(*args)._replace(**({"forward": "split"} if args[-1] == 32 else {}))

configs.forms_of = bypassed
backward = layer.AtenControl.backward

def wrong(ctx, dy):
    return backward(ctx, dy * (1.02 if len(ctx.frozen[1]) == 32 else 1))

layer.AtenControl.backward = staticmethod(wrong)
"""


def test_a_form_that_was_not_taken_is_refused(tmp_path):
    done = dry_run(tmp_path, "bench_layer.py", "-k", "forms", injected=BYPASSED)
    forms = {names.of_form(word): word for word in FORM_NAMES}
    refused = {one["implementation"]: one["why"] for one in done.result.refused}
    assert refused.keys() == forms.keys() - {FAST} | {ATEN}, done.text
    assert all("r = 32" in one["group"] for one in done.result.refused)
    assert len(done.result.groups) == 2 * 6  # two passes, three clocks
    for group in done.result.groups:
        wrong = refused.keys() if group.axes["rank"] == 32 else set()
        assert group.timings.keys() == {BARE, *forms, ATEN} - wrong, group.name
    assert refused[names.of_form("fused")].startswith("launched {'down_projection': 2, 'up_projection': 1, ")
    assert "the relative error of dx is 2.0" in refused[ATEN]


# Each call of a layer draws another seed, and a compiled one gives 2 % too much.
WRONG_STREAMS = """
import os
import torch
from mica.fast.forward import decide, fast_check

def seeded(p, device):
    seed = torch.tensor([int.from_bytes(os.urandom(7), "big")]) if p else None
    return (p, seed)

decide.seeded = fast_check.seeded = seeded

compile = torch.compile

def broken(module, **options):
    compiled = compile(module, **options)
    return lambda x: compiled(x) * 1.02

torch.compile = broken
"""


def test_the_check_of_streams_reports_what_is_wrong_and_what_needs_a_gpu(tmp_path):
    done = dry_run(tmp_path, "test_streams.py", injected=WRONG_STREAMS)
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
    disabled = "import mica.fast\nmica.fast.disable()\nmica.fast.enable = lambda: None"
    done = dry_run(tmp_path, "test_streams.py", "-k", "checkpoint", injected=disabled)
    assert set(done.outcomes.values()) == {"failed"}
