"""The summary's lines: each with its figures, and each cell counted once."""

import pytest

from bench.report.summary import summary
from bench.results import names
from bench.results.names import BACKWARD, BARE, BOTH, FAST, FORWARD, GRAPH, NO_GRADIENT, STOCK, STOCK_16
from bench.results.schema import Result
from tests.support.bench_results import a_group

SHAPE = {"suite": "layer", "out": 64, "in": 32, "rank": 8, "dtype": "bfloat16"}


def layer(tokens, part, fast, **axes):
    axes = {**SHAPE, "tokens": tokens, "pass": part, **axes}
    name = ", ".join(["layer", f"{tokens} tokens", part, *([axes["clock"]] if "clock" in axes else [])])
    return a_group(name, axes, {BARE: 1.0, STOCK: 2.0, STOCK_16: 1.5, FAST: fast})


def summarised(groups):
    """title -> figures"""
    lines = summary(Result({}, groups).with_both())
    return dict(line.removeprefix("- ").replace("**", "").split(": ", 1) for line in lines)


@pytest.fixture
def groups():
    step = a_group(
        "a step",
        {"suite": "step", "tokens": 1024, "dtype": "bfloat16"},
        {BARE: 4.0, STOCK: 6.0, FAST: 4.5},
        {BARE: {"saved_mb": 100.0}, STOCK: {"saved_mb": 300.0}, FAST: {"saved_mb": 140.0}},
    )
    once = {"initialisation": (20.0, 2.5), "loading": (26.0, 0.26), "merge": (1.0, 3.0)}
    others = [
        a_group(suite, {"suite": suite, "model": "M"}, {STOCK: stock, FAST: fast})
        for suite, (stock, fast) in once.items()
    ]
    cells = ((128, 2.2), (512, 1.6))
    layers = [layer(tokens, part, fast) for tokens, fast in cells for part in (FORWARD, BACKWARD)]
    return [step, *others, *layers]


def test_each_line_has_its_figures(groups):
    lines = summarised(groups)
    assert lines["Initialisation"] == "8.000× (8.00–8.00) as fast as stock PEFT for M (20 s → 2.5 s)."
    assert lines["Loading an adapter"] == "100.0× (100–100) as fast as stock PEFT for M (26 s → 0.26 s)."
    step = "a step: 1.333× (1.33–1.33) as fast, 1.12 times the bare frozen model, stock PEFT 1.50 times."
    assert lines["A training step"] == step
    assert lines["Memory"] == (
        "a step: 160 MB less are saved for the backward (300 → 140 MB, the bare model 100 MB)."
    )
    assert lines["Where it is not faster than stock PEFT"] == (  # worst first
        "2 of 6 cells (ratios of time): merge: 3.000 (3.00–3.00); "
        "layer, 128 tokens, forward + backward: 1.100 (1.10–1.10)."
    )
    (narrow,) = (figures for title, figures in lines.items() if "told to keep" in title)
    assert narrow.startswith("2 of 2 cells")
    many, few, all_ = (figures for title, figures in lines.items() if "ayers" in title)
    assert many == "bfloat16, 1 cells: 1.25× to 1.25× as fast, median 1.25×."
    assert few == "bfloat16, 1 cells: 0.91× to 0.91× as fast, median 0.91×."
    assert all_ == "bfloat16, 2 cells: 0.68× to 0.94× as fast, median 0.81×."


def test_of_many_slower_cells_the_worst_are_named():
    lines = summarised([layer(i, NO_GRADIENT, 2 + i / 10) for i in range(1, 10)])
    slower = lines["Where it is not faster than stock PEFT"]
    assert slower.startswith(
        "9 of 9 cells (ratios of time): layer, 9 tokens, forward without gradient: 1.450"
    )
    assert slower.count("layer,") == 6
    assert slower.endswith("; the others are less slow, 1.050 or more (tables below).")


def test_a_cell_of_three_clocks_is_one_cell_of_each():
    cells = [
        layer(tokens, part, fast * (1 if tokens == 1 else 0.5), clock=clock)
        for tokens in (1, 512)
        for clock, fast in ((names.WALL, 3.0), (names.DEVICE_TIME, 1.0), (GRAPH, 4.0))
        for part in (FORWARD, BACKWARD)
    ]
    once = a_group("get", {"suite": "loading"}, {STOCK: 1.0, FAST: 0.5})
    lines = summarised([*cells, once])
    slower = {title: figures for title, figures in lines.items() if "than stock PEFT," in title}
    assert slower == {
        f"Where it is not faster than stock PEFT, {names.WALL}": "1 of 3 cells (ratios of time): "
        f"layer, 1 tokens, forward + backward, {names.WALL}: 1.500 (1.50–1.50).",
        f"Where it is not faster than stock PEFT, {names.DEVICE_TIME}": "nowhere, in 2 cells.",
    }
    few = [figures for title, figures in lines.items() if "fewer" in title]
    assert [figures[:36] for figures in few] == [
        "bfloat16, 1 cells: 0.67× to 0.67× as",
        "bfloat16, 1 cells: 2.00× to 2.00× as",
    ]
    assert lines["Loading an adapter"] == "2.000× (2.00–2.00) as fast as stock PEFT for get (1 s → 0.5 s)."
    assert not any(GRAPH in title for title in lines)


@pytest.mark.parametrize("implementation", [BARE, STOCK, FAST])
def test_an_implementation_without_a_number_leaves_the_other_lines(implementation, groups):
    for group in groups:
        group.timings.pop(implementation, None)
    lines = summarised(groups)
    assert lines["Memory"] == "not measured in this run."
    assert "times the" not in lines["A training step"]
    slower = lines["Where it is not faster than stock PEFT"]
    assert slower.startswith("2 of 6 cells" if implementation == BARE else "not measured")


def host(suite, call, dtype, medians):
    layers = {"layers": 4} if suite == "host block" else {}
    return a_group(f"{suite}, {dtype}", {"suite": suite, "dtype": dtype, "call": call, **layers}, medians)


def test_host_time_has_its_target():
    narrow = {STOCK_16: 100, names.PYTORCH: 90, names.PYTORCH_16: 80, names.KERNELS: 70, names.KERNELS_16: 60}
    wide = {names.PYTORCH: 120, names.KERNELS: 80}
    block = {STOCK: 100, names.PYTORCH: 75, names.KERNELS: 65}
    lines = summarised(
        [
            host("host layer", BOTH, "float32", {STOCK: 100, **wide}),
            host("host layer", BOTH, "bfloat16", {STOCK: 200, **narrow}),
            host("host layer", NO_GRADIENT, "float32", {STOCK: 100, names.PYTORCH: 100, names.KERNELS: 101}),
            # its baseline is refused; stock's default is in another dtype
            host("host layer", NO_GRADIENT, "bfloat16", {STOCK: 100, names.PYTORCH: 50}),
            host("host block", BOTH, "float32", block),
            host("host block", NO_GRADIENT, "float32", {STOCK: 100, names.PYTORCH: 1}),
        ]
    )
    both, no_gradient, blocks = (
        f"{title}: {figures}" for title, figures in lines.items() if "Host time" in title
    )
    assert "forward + backward" in both
    assert "(target: at most 0.8): 4 of 6 met: float32, PyTorch form: 1.200" in both
    assert "; float32, kernels with a driver that launches nothing: 0.800" in both
    assert "; bfloat16, PyTorch form, adapters in the base dtype: 0.800" in both  # ÷ stock with 16-bit ones
    assert "without gradient" in no_gradient
    assert "(target: at most 1.0): 1 of 2 met: float32, PyTorch form: 1.000" in no_gradient
    assert "(target: at most 0.7): 1 of 2 met: 4 blocks, float32, PyTorch form: 0.750" in blocks
    assert "0.010" not in blocks


def test_generation_by_ratio_and_per_token():
    axes = {"suite": "generation", "model": "M", "new tokens": 20}
    medians = {BARE: 1.0, names.MERGED: 1.1, STOCK: 2.0, FAST: 2.5}
    lines = summarised([a_group("generate()", axes, medians)])
    (line,) = (f"{title}: {figures}" for title, figures in lines.items() if "generate()" in title)
    assert (
        "(target: at most 1.0): M: 1.250 (1.25–1.25); ms per token: mica.fast 125, stock PEFT 100, " in line
    )
    assert line.endswith("adapter merged 55, bare frozen model 50.")


def test_what_was_not_measured_is_reported():
    for line in summary(Result({}, [])):
        assert line.endswith(": not measured in this run.")
