"""The kernels' check and their bandwidths: an error in one of them is attributed to it alone."""

import json

import pytest
import torch

from bench.results.names import COPY, DEVICE_TIME, GRAPH, WALL
from bench.suites.bench_kernels import NAMES, launch_bytes
from mica.kernels.down_projection import plan_down_projection
from mica.kernels.up_projection import plan_up_projection
from tests.support.dry_run import dry_run

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


def test_a_kernel_with_wrong_numbers_fails_its_check(tmp_path):
    wrong = 'if first == ("g_ptr", "x_ptr"): launch.args["scale"] *= 1.05'
    done = dry_run(tmp_path, "check_kernels.py", injected=BROKEN.format(wrong))
    failed = {name for name, outcome in done.outcomes.items() if outcome == "failed"}
    of_grad_a = {f"test_kernel[grad_a-{shape}]" for shape in ("aligned", "odd", "fp32")}
    assert failed == of_grad_a | {"test_operator"}, done.text
    assert set(done.outcomes.values()) == {"passed", "failed"}
    assert "the relative error of grad_a is 5.00e-02" in done.whys["test_kernel[grad_a-aligned]"]
    assert {check["name"].partition("::")[2] for check in done.result.checks} == done.outcomes.keys()


def test_a_kernel_that_leaves_output_unwritten_fails_its_check(tmp_path):
    grid = 'launch.grid = (1, 1) if first in [("base_ptr", "out_ptr"), ("index_ptr", "a_ptr")] else plan.grid'
    done = dry_run(tmp_path, "check_kernels.py", "-k", "up-B or embedding", injected=BROKEN.format(grid))
    assert done.outcomes["test_kernel[embedding-aligned]"] == "failed", done.text
    assert "the relative error of embedding is inf" in done.whys["test_kernel[embedding-aligned]"]
    assert done.outcomes["test_kernel[up-B-fp32]"] == "failed"
    assert done.outcomes["test_kernel[up-B-one token]"] == "passed"  # it has one tile


@pytest.fixture(scope="module")
def two_broken(tmp_path_factory):
    """One configuration of two kernels gives wrong numbers, one of another cannot be launched."""
    breaking = """
    if plan.config[0] == 64 and first == ("x_ptr", "p_ptr"):
        launch.args["scale"] *= 1.05
    if plan.config[0] == 16 and first == ("base_ptr", "out_ptr"):
        raise RuntimeError("out of something")
    """
    folder = tmp_path_factory.mktemp("results")
    injected = BROKEN.format(breaking.strip())
    return dry_run(folder, "bench_kernels.py", "-k", "not tuning", injected=injected)


def test_a_configuration_is_refused_alone(two_broken):
    refused = {one["implementation"]: one["why"] for one in two_broken.result.refused}
    assert {name.partition(", ")[0] for name in refused} == {
        NAMES[key] for key in ("down-A", "down-B", "up-B")
    }
    for name, why in refused.items():
        word = "out of something" if name.startswith(NAMES["up-B"]) else "the relative error is 5.0"
        assert word in why, (name, why)
    timed = {implementation for group in two_broken.result.groups for implementation in group.timings}
    assert not timed & refused.keys()
    for key, kernel in NAMES.items():
        groups = list(two_broken.result.select(suite="kernels", kernel=kernel))
        assert {group.axes["clock"] for group in groups} == {WALL, DEVICE_TIME, GRAPH}
        assert all({COPY} < group.timings.keys() for group in groups), key


def test_bytes_are_those_of_the_copy(two_broken):
    for group in two_broken.result.select(suite="kernels", clock=WALL):
        sizes = {timing.facts["bytes"] for timing in group.timings.values()}
        assert len(sizes) == 1
        assert sizes.pop() >= 2 * group.axes["tokens"] * group.axes["features"]


def test_the_bytes_of_a_launch():
    base, h, factor = torch.zeros(20, 24), torch.zeros(20, 16), torch.zeros(16, 24)
    out, launch = plan_up_projection(base, h, factor).bound()
    assert launch_bytes(launch, out) == 4 * (2 * 20 * 24 + 20 * 16 + 16 * 24)
    x, factor = torch.zeros(20, 4096), torch.zeros(16, 4096)
    out, launch = plan_down_projection(x, factor).bound()
    assert launch.meta["SPLIT"]  # whose parts need not be
    assert launch_bytes(launch, out) == 4 * (20 * 4096 + 16 * 4096 + 20 * 16)


def test_the_tuner_writes_its_table_next_to_the_journal(tmp_path):
    (tmp_path / "tuning.json").write_text('{"of an earlier run": "x"}')
    done = dry_run(tmp_path, "bench_kernels.py", "-k", "tuning")
    assert done.outcomes == {"test_tuning_table": "passed"}, done.text
    entries = json.loads((tmp_path / "tuning.json").read_text())
    assert "of an earlier run" not in entries
    assert {"linear", "linear_backward"} <= {entry.partition(" | ")[0] for entry in entries}


def test_a_layer_that_is_wrong_when_tuned_is_named(tmp_path):
    wrong = """
    from mica.kernels import tuning
    if tuning.is_measuring() and first == ("g_ptr", "x_ptr"):
        launch.args["scale"] *= 1.05
    """
    done = dry_run(tmp_path, "bench_kernels.py", "-k", "tuning", injected=BROKEN.format(wrong.strip()))
    assert done.outcomes == {"test_tuning_table": "failed"}
    assert "dA is 5.00e-02 off the untuned one" in done.result.refused[0]["why"]
