"""The suite of three layers on one x: only what is wrong, or ran on no kernels, has no number."""

from bench.results import names
from bench.results.names import BACKWARD, BARE, DEVICE_TIME, FORWARD, GROUPED, STOCK_16, UNGROUPED, WALL
from tests.support.dry_run import dry_run

WRONG = """
from mica import ops

right = ops.mica_linear_group

def wrong(*args):
    first, *others = right(*args)
    return [first, *(y * 1.02 for y in others)]

ops.mica_linear_group = wrong
"""


def refused(done):
    return {one["implementation"]: one["why"] for one in done.result.refused}


def test_a_wrong_group_is_refused_alone(tmp_path):
    done = dry_run(tmp_path, "bench_group.py", injected=WRONG)
    assert refused(done).keys() == {GROUPED}, done.text
    assert "the relative error of y is 2.0" in refused(done)[GROUPED]
    groups = [*done.result.select(suite="group", layers=3)]
    assert {(group.axes["pass"], group.axes["clock"]) for group in groups} == {
        (part, clock) for part in (FORWARD, BACKWARD) for clock in (WALL, DEVICE_TIME, names.GRAPH)
    }
    for group in groups:
        assert group.timings.keys() == {BARE, STOCK_16, UNGROUPED}
        if group.axes["clock"] == WALL:
            assert group.timings[UNGROUPED].facts.keys() == {f"error of {what}" for what in ("y", "dx", "dA")}


def test_without_kernels_ours_have_no_number(tmp_path):
    done = dry_run(tmp_path, "bench_group.py", injected='import os\nos.environ["MICA_BACKEND"] = "reference"')
    assert refused(done) == dict.fromkeys([UNGROUPED, GROUPED], "on kernels ran nothing")
    assert all(group.timings.keys() == {BARE, STOCK_16} for group in done.result.groups)
