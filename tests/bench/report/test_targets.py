"""The targets on a GPU: met, not met or not measured, by device time, from what the result holds."""

import pytest

from bench.report import targets
from bench.results import names
from bench.results.names import ATEN, BARE, COMPILED, COPY, DEVICE_TIME, DOWN_A, FAST, STOCK, STOCK_16, WALL
from bench.results.schema import Result
from tests.support.bench_results import a_group

SHAPE = {"tokens": 8192, "out": 4096, "in": 4096, "rank": 16, "dtype": "bfloat16"}
ERRORS = {FAST: {"error of y": 1.1e-3, "error of dx": 2.3e-3, "error of dA": 1e-3}}
ERRORS[STOCK] = {"error of y": 1e-3, "error of dx": 2e-3, "error of dA": 2e-3}
# at the limit of every target, forward and backward
LAYER = {
    names.FORWARD: {BARE: 1.0, FAST: 1.279, STOCK: 2.1, STOCK_16: 1.5, ATEN: 1.2, COMPILED: 1.3},
    names.BACKWARD: {BARE: 1.0, FAST: 1.351, STOCK: 2.1, STOCK_16: 1.53, ATEN: 1.5, COMPILED: 1.27},
}


def cells(suite, passes, clock=DEVICE_TIME, facts=None, factor=1.0, **axes):
    axes = {"suite": suite, **SHAPE, "clock": clock, **axes}
    return [
        a_group(
            f"{suite}, {axes['tokens']} tokens, {part}",
            {**axes, "pass": part},
            {name: factor * seconds for name, seconds in medians.items()},
            facts,
        )
        for part, medians in passes.items()
    ]


def kernel(name, tokens, shares, clock=DEVICE_TIME, copied=None):
    """A kernel whose configurations reach these shares of a copy's bandwidth, by device time."""
    axes = {"suite": "kernels", "kernel": name, "tokens": tokens, "features": 64, "rank": 16}
    medians = {COPY: 1.0, **{implementation: 1 / share for implementation, share in shares.items()}}
    facts = {implementation: {"bytes": 6e9} for implementation in shares} | {
        COPY: {"bytes": copied} if copied else {}
    }
    groups = []
    for one in (WALL, DEVICE_TIME):  # facts are noted in the cell of one of them
        scaled = {
            implementation: (9 if one == WALL else 1) * seconds for implementation, seconds in medians.items()
        }
        name_ = f"{name}, {tokens} tokens, {one}"
        groups.append(
            a_group(name_, {**axes, "dtype": "bfloat16", "clock": one}, scaled, facts if one == clock else {})
        )
    return groups


def table(groups):
    """what -> (measured, met)"""
    rows = [one.row for one in targets.targets(Result({}, groups).with_both())]
    assert all(len(row) == 4 for row in rows)
    assert len({what for what, *_ in rows}) == len(rows)
    return {what: (measured, met) for what, _, measured, met in rows}


def test_times_are_of_this_layer_by_device_time():
    wrong = [  # all of them far off
        *cells("layer", LAYER, clock=WALL, factor=9.0),
        *cells("layer", {part: {**one, FAST: 9.0} for part, one in LAYER.items()}, tokens=2048),
        *cells("layer", {part: {**one, FAST: 9.0} for part, one in LAYER.items()}, clock=WALL),
        *cells("layer", {part: {**one, FAST: 9.0} for part, one in LAYER.items()}, rank=64),
    ]
    assert {met for _, met in table(wrong).values()} == {"not measured"}
    rows = table([*wrong, *cells("layer", LAYER)])
    assert [*rows.values()][:6] == [
        ("27.900 (27.90–27.90)", "yes"),
        ("35.100 (35.10–35.10)", "**NO**"),
        ("1.152 (1.15–1.15)", "yes"),  # 3.03 ÷ 2.63
        ("1.597 (1.60–1.60)", "**NO**"),
        ("1.027 (1.03–1.03)", "yes"),
        ("0.977 (0.98–0.98)", "**NO**"),
    ]
    assert "a layer, backward: % that mica.fast adds" in [*rows][1]
    assert [*rows][2] == "a layer, forward + backward: stock PEFT, adapters in the base dtype ÷ mica.fast"


def test_errors_are_noted_in_the_cell_of_another_clock():
    groups = [*cells("layer", LAYER), *cells("layer", LAYER, clock=WALL, facts=ERRORS)]
    rows = table(groups)
    assert [rows[f"a layer: error of {what} ÷ that of stock PEFT"] for what in ("y", "dx", "dA")] == [
        ("1.100", "yes"),
        ("1.150", "**NO**"),
        ("0.500", "yes"),
    ]


def test_a_kernel_counts_by_its_slowest_large_cell_in_its_first_configuration():
    groups = [
        *kernel(DOWN_A, 8192, {"64 x 64": 0.9, "32 x 32": 0.1}, clock=WALL),
        *kernel(DOWN_A, 4096, {"64 x 64": 0.85}),
        *kernel(DOWN_A, 2048, {"64 x 64": 0.3}),
        *kernel(names.UP_B, 8192, {"a": 0.9, "b": 0.99}, copied=12e9),
        *kernel("embedding", 8192, {"a": 0.1}),
    ]
    rows = {what: row for what, row in table(groups).items() if "bandwidth" in what}
    start = "bandwidth ÷ that of a copy"
    assert rows == {
        f"{DOWN_A}: {start}; {DOWN_A}, 4096 tokens, {DEVICE_TIME}, 64 x 64": ("0.850 (0.85–0.85)", "yes"),
        f"{names.UP_B}: {start}; {names.UP_B}, 8192 tokens, {DEVICE_TIME}, a": (
            "0.450 (0.45–0.45)",
            "**NO**",
        ),
        f"{names.DOWN_B}: {start}; from 4096 tokens": ("", "not measured"),
        f"{names.GRAD_A}: {start}; from 4096 tokens": ("", "not measured"),
    }


@pytest.mark.parametrize(
    ("implementation", "start"),
    [
        (BARE, "a layer, forward:"),
        (FAST, "a layer"),
        (STOCK, "a layer: error"),
        (STOCK, "a layer, forward + backward: stock PEFT ÷"),
    ],
)
def test_an_implementation_without_a_number_is_not_measured(implementation, start):
    groups = cells("layer", LAYER, facts=ERRORS)
    assert "not measured" not in {met for what, (_, met) in table(groups).items() if what.startswith(start)}
    for group in groups:
        del group.timings[implementation]
    assert {met for what, (_, met) in table(groups).items() if what.startswith(start)} == {"not measured"}


@pytest.mark.parametrize("missing", ["copy", "bytes"])
def test_a_kernel_without_a_copy_or_counted_bytes_is_not_measured(missing):
    groups = kernel(names.GRAD_A, 8192, {"a": 0.9})
    assert "yes" in {met for _, met in table(groups).values()}
    for group in groups:
        if missing == "copy":
            del group.timings[COPY]
        else:
            group.timings["a"].facts.clear()
    assert {met for _, met in table(groups).values()} == {"not measured"}
