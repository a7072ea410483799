"""The lines that answer: each with its figure, and each cell counted once."""

import pytest

from bench.report.answers import answers
from bench.results import names
from bench.results.names import (
    BACKWARD,
    BARE,
    BOTH,
    DEVICE_TIME,
    FAST,
    FORWARD,
    GRAPH,
    NO_GRADIENT,
    STOCK,
    STOCK_16,
    WALL,
)
from bench.results.schema import Result
from tests.support.bench_results import a_group

SHAPE = {"suite": "layer", "out": 64, "in": 32, "rank": 8, "dtype": "bfloat16"}


def layer(tokens, part, fast, **axes):
    axes = {**SHAPE, "tokens": tokens, "pass": part, **axes}
    name = ", ".join(["layer", f"{tokens} tokens", part, *([axes["clock"]] if "clock" in axes else [])])
    return a_group(name, axes, {BARE: 1.0, STOCK: 2.0, STOCK_16: 1.5, FAST: fast})


def told(groups):
    """question -> answer"""
    lines = answers(Result({}, groups).with_both())
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


def test_each_question_is_answered_with_its_figure(groups):
    found = told(groups)
    assert found["Initialisation"] == "8.000× (8.00–8.00) as fast as stock PEFT for M (20 s → 2.5 s)."
    assert found["Loading an adapter"] == "100.0× (100–100) as fast as stock PEFT for M (26 s → 0.26 s)."
    step = "a step: 1.333× (1.33–1.33) as fast, 1.12 times the bare frozen model, stock PEFT 1.50 times."
    assert found["A training step"] == step
    assert found["Memory"] == (
        "a step: 160 MB less are saved for the backward (300 → 140 MB, the bare model 100 MB)."
    )
    assert found["Where it is not faster than stock PEFT"] == (  # worst first
        "2 of 6 cells (ratios of time): merge: 3.000 (3.00–3.00); "
        "layer, 128 tokens, forward + backward: 1.100 (1.10–1.10)."
    )
    (narrow,) = (answer for question, answer in found.items() if "told to keep" in question)
    assert narrow.startswith("2 of 2 cells")
    many, few, all_ = (answer for question, answer in found.items() if "ayers" in question)
    assert many == "bfloat16, 1 cells: 1.25× to 1.25× as fast, median 1.25×."
    assert few == "bfloat16, 1 cells: 0.91× to 0.91× as fast, median 0.91×."
    assert all_ == "bfloat16, 2 cells: 0.68× to 0.94× as fast, median 0.81×."


def test_of_many_slower_cells_the_worst_are_told():
    found = told([layer(i, NO_GRADIENT, 2 + i / 10) for i in range(1, 10)])
    answer = found["Where it is not faster than stock PEFT"]
    assert answer.startswith(
        "9 of 9 cells (ratios of time): layer, 9 tokens, forward without gradient: 1.450"
    )
    assert answer.count("layer,") == 6
    assert answer.endswith("; the others are less slow, 1.050 or more (tables below).")


def test_a_cell_of_three_clocks_is_one_cell_of_each():
    cells = [
        layer(tokens, part, fast * (1 if tokens == 1 else 0.5), clock=clock)
        for tokens in (1, 512)
        for clock, fast in ((WALL, 3.0), (DEVICE_TIME, 1.0), (GRAPH, 4.0))
        for part in (FORWARD, BACKWARD)
    ]
    once = a_group("get", {"suite": "loading"}, {STOCK: 1.0, FAST: 0.5})
    found = told([*cells, once])
    slower = {question: answer for question, answer in found.items() if "than stock PEFT," in question}
    assert slower == {
        f"Where it is not faster than stock PEFT, {WALL}": "1 of 3 cells (ratios of time): "
        f"layer, 1 tokens, forward + backward, {WALL}: 1.500 (1.50–1.50).",
        f"Where it is not faster than stock PEFT, {DEVICE_TIME}": "nowhere, in 2 cells.",
    }
    few = [answer for question, answer in found.items() if "fewer" in question]
    assert [answer[:36] for answer in few] == [
        "bfloat16, 1 cells: 0.67× to 0.67× as",
        "bfloat16, 1 cells: 2.00× to 2.00× as",
    ]
    assert found["Loading an adapter"] == "2.000× (2.00–2.00) as fast as stock PEFT for get (1 s → 0.5 s)."
    assert not any(GRAPH in question for question in found)


@pytest.mark.parametrize("implementation", [BARE, STOCK, FAST])
def test_an_implementation_without_a_number_leaves_the_other_answers(implementation, groups):
    for group in groups:
        group.timings.pop(implementation, None)
    found = told(groups)
    assert found["Memory"] == "not measured in this run."
    assert "times the" not in found["A training step"]
    slower = found["Where it is not faster than stock PEFT"]
    assert slower.startswith("2 of 6 cells" if implementation == BARE else "not measured")


def host(suite, call, dtype, medians):
    layers = {"layers": 4} if suite == "host block" else {}
    return a_group(f"{suite}, {dtype}", {"suite": suite, "dtype": dtype, "call": call, **layers}, medians)


def test_the_hosts_time_is_told_with_what_is_asked_for():
    narrow = {STOCK_16: 100, names.PYTORCH: 90, names.PYTORCH_16: 80, names.KERNELS: 70, names.KERNELS_16: 60}
    wide = {names.PYTORCH: 120, names.KERNELS: 80}
    block = {STOCK: 100, names.PYTORCH_GROUPED: 75, names.KERNELS_GROUPED: 65}
    found = told(
        [
            host("host layer", BOTH, "float32", {STOCK: 100, **wide}),
            host("host layer", BOTH, "bfloat16", {STOCK: 200, **narrow}),
            host("host layer", NO_GRADIENT, "float32", {STOCK: 100, names.PYTORCH: 100, names.KERNELS: 101}),
            # its implementation is refused; stock's default is in another dtype
            host("host layer", NO_GRADIENT, "bfloat16", {STOCK: 100, names.PYTORCH: 50}),
            host("host block", BOTH, "float32", block),
            host("host block", NO_GRADIENT, "float32", {STOCK: 100, names.PYTORCH_GROUPED: 1}),
        ]
    )
    lines = [f"{question}: {answer}" for question, answer in found.items() if "Host time" in question]
    both, no_gradient, blocks = lines
    assert "forward + backward" in both
    assert "(asked: at most 0.8): 4 of 6 as asked: float32, PyTorch form: 1.200" in both
    assert "; float32, kernels with a driver that launches nothing: 0.800" in both
    assert "; bfloat16, PyTorch form, adapters in the base dtype: 0.800" in both  # ÷ stock with 16-bit ones
    assert "without gradient" in no_gradient
    assert "(asked: at most 1.0): 1 of 2 as asked: float32, PyTorch form: 1.000" in no_gradient
    assert "(asked: at most 0.7): 1 of 2 as asked: 4 blocks, float32, PyTorch form, grouped: 0.750" in blocks
    assert "0.010" not in blocks


def test_generating_is_told_by_ratio_and_by_token():
    axes = {"suite": "generation", "model": "M", "new tokens": 20}
    medians = {BARE: 1.0, names.MERGED: 1.1, STOCK: 2.0, FAST: 2.5}
    found = told([a_group("generate()", axes, medians)])
    (line,) = (f"{question}: {answer}" for question, answer in found.items() if "generate()" in question)
    assert "(asked: at most 1.0): M: 1.250 (1.25–1.25); ms a token: mica.fast 125, stock PEFT 100, " in line
    assert line.endswith("adapter merged 55, bare frozen model 50.")


def test_what_was_not_measured_is_said():
    for line in answers(Result({}, [])):
        assert line.endswith(": not measured in this run.")
