"""The report: tables, and the lines that answer."""

from importlib import import_module

import pytest

answers, report, results = (import_module(f"bench.{name}") for name in ("answers", "report", "results"))
BARE, STOCK, STOCK_16, FAST = results.BARE, results.STOCK, results.STOCK_16, results.FAST
MACHINE = {"cpu": "A", "threads": 2, "torch": "2.9", "commit": "abc", "uncommitted_changes": False}


def group(name, axes, **medians):
    """Rivals with nine rounds within 1 % of their medians, the same ones for all."""
    rivals = {
        getattr(results, rival): results.Rival([seconds * (1 + i / 1000) for i in range(-4, 5)], {})
        for rival, seconds in medians.items()
    }
    return results.Group(name, axes, rivals)


def layer(tokens, part, fast):
    axes = {"suite": "layer", "tokens": tokens, "out": 64, "in": 32, "rank": 8, "dtype": "bfloat16"}
    return group(
        f"layer, {tokens} tokens, {part}",
        {**axes, "pass": part},
        BARE=1.0,
        STOCK=2.0,
        STOCK_16=1.5,
        FAST=fast,
    )


@pytest.fixture
def result():
    step = group(
        "training step",
        {"suite": "step", "tokens": 1024, "dtype": "bfloat16"},
        BARE=4.0,
        STOCK=6.0,
        FAST=4.5,
    )
    for rival, mb in ((BARE, 100.0), (STOCK, 300.0), (FAST, 140.0)):
        step.rivals[rival].facts["saved_mb"] = mb
    once = {"initialisation": (20.0, 2.5), "loading": (26.0, 0.26), "merge": (1.0, 3.0)}
    others = [
        group(suite, {"suite": suite, "model": "M"}, STOCK=stock, FAST=fast)
        for suite, (stock, fast) in once.items()
    ]
    layers = [
        layer(tokens, part, fast)
        for tokens, fast in ((128, 2.2), (512, 1.6))
        for part in (results.FORWARD, results.BACKWARD)
    ]
    return results.Result(MACHINE, [step, *others, *layers])


def test_each_question_is_answered_with_its_figure(result):
    lines = {
        line.partition("**: ")[0].removeprefix("- **"): line for line in answers.answers(result.with_both())
    }
    assert "8.000× (8.00–8.00) as fast" in lines["Initialisation"]
    assert "20.0 s → 2.5 s" in lines["Initialisation"]
    assert "1.333× (1.33–1.33) as fast, 1.12 times the bare frozen model" in lines["A training step"]
    assert "100.000× (100.00–100.00)" in lines["Loading an adapter"].replace("100.0×", "100.000×").replace(
        "(100–100)", "(100.00–100.00)"
    )
    assert "160 MB less" in lines["Memory"]
    assert "2 of 6 cells" in lines["Where it is not faster than stock PEFT"]
    worst_first = lines["Where it is not faster than stock PEFT"]
    assert worst_first.index("merge: 3.000") < worst_first.index("128 tokens")
    assert "2 of 2 cells" in next(line for name, line in lines.items() if "16 bit" in name)
    few = next(line for name, line in lines.items() if "fewer than 256" in name)
    assert "128 x 64 x 32, r = 8, bfloat16: 1.100" in few
    assert "512" not in few


def host(suite, call, dtype, **medians):
    layers = {"layers": 4} if suite == "host block" else {}
    axes = {"suite": suite, "dtype": dtype, "call": call, **layers}
    return group(f"{suite}, {dtype}, {call}", axes, **medians)


def test_the_hosts_time_is_told_with_what_is_asked_for():
    narrow = {"STOCK_16": 100.0, "PYTORCH": 90.0, "PYTORCH_16": 80.0, "KERNELS": 70.0, "KERNELS_16": 60.0}
    groups = [
        host("host layer", results.BOTH, "float32", STOCK=100.0, PYTORCH=120.0, KERNELS=80.0),
        host("host layer", results.BOTH, "bfloat16", STOCK=200.0, **narrow),
        host("host layer", results.NO_GRADIENT, "float32", STOCK=100.0, PYTORCH=100.0, KERNELS=101.0),
        host("host block", results.BOTH, "float32", STOCK=100.0, PYTORCH_GROUPED=75.0, KERNELS_GROUPED=65.0),
        host("host block", results.NO_GRADIENT, "float32", STOCK=100.0, PYTORCH_GROUPED=1.0),
    ]
    lines = [line for line in answers.answers(results.Result(MACHINE, groups)) if "Host time" in line]
    both, no_gradient, block = lines
    assert "forward + backward" in both
    assert "(asked: at most 0.8): 4 of 6 as asked: float32, PyTorch form: 1.200" in both
    assert "; float32, kernels with a driver that launches nothing: 0.800" in both
    assert "; bfloat16, PyTorch form, adapters in the base dtype: 0.800" in both  # ÷ stock with 16-bit ones
    assert "without gradient" in no_gradient
    assert "(asked: at most 1.0): 1 of 2 as asked: float32, PyTorch form: 1.000" in no_gradient
    assert "(asked: at most 0.7): 1 of 2 as asked: 4 blocks, float32, PyTorch form, grouped: 0.750" in block
    assert "0.010" not in block


def test_generating_is_told_by_ratio_and_by_token():
    axes = {"suite": "generation", "model": "M", "new tokens": 20}
    groups = [group("generate()", axes, BARE=1.0, MERGED=1.1, STOCK=2.0, FAST=2.5)]
    line = next(
        line for line in answers.answers(results.Result(MACHINE, groups)) if "generate()" in line[:20]
    )
    assert "(asked: at most 1.0): M: 1.250 (1.25–1.25); ms a token: mica.fast 125, stock PEFT 100, " in line
    assert line.endswith("adapter merged 55, bare frozen model 50.")


@pytest.mark.parametrize(
    ("suite", "title"),
    [
        ("host layer", "## Host time of a layer"),
        ("host block", "## Host time of a decoder block"),
        ("generation", "## Generating, token by token"),
    ],
)
def test_the_hosts_time_has_a_table_in_every_kind_of_call(suite, title):
    groups = [
        host(suite, call, "bfloat16", BARE=1.0, STOCK=2.0, STOCK_16=1.6, KERNELS=1.2)
        for call in (results.NO_GRADIENT, results.BOTH)
    ]
    for one in groups:
        one.axes |= {"new tokens": 1, "model": "M"}
        one.rivals |= {"mica.fast": one.rivals[results.STOCK], "adapter merged": one.rivals[results.STOCK]}
    text = report.report(results.Result(MACHINE, groups))
    assert title in text
    table = (
        "| mica.fast, kernels with a driver that launches nothing | 1.2 | 1.200 (1.20–1.20) "
        "| 0.600 (0.60–0.60) | 0.750 (0.75–0.75) |"
    )
    assert text.count(table) == 2


def test_what_was_not_measured_is_said():
    lines = answers.answers(results.Result(MACHINE, []))
    assert all(line.endswith("not measured in this run.") for line in lines)


def test_the_tables_have_ratios_to_stock_and_to_the_bare_model(result):
    text = report.report(result)
    assert "| 128 | 64 x 32 | 8 | 2e+03 | 2.000 (2.00–2.00) | 2.200 (2.20–2.20) | 1.100 (1.10–1.10) |" in text
    assert "| mica.fast | 4.5 | 1.125 (1.12–1.12) | 0.750 (0.75–0.75) | 140 |" in text
    assert "No number" not in text


def test_the_column_of_overheads_is_there_where_both_are():
    rivals = {name: results.Rival([1.0 * i, 2.0 * i]) for i, name in enumerate((BARE, "PEFT LoRA", FAST), 1)}
    header = report.group_table(results.Group("step", {}, rivals)).splitlines()[2]
    assert header.endswith("| overhead ÷ that of PEFT LoRA |")
    del rivals[BARE]
    assert "overhead" not in report.group_table(results.Group("step", {}, rivals))


def test_refused_cells_are_listed(result):
    result.refused = [{"group": "a cell", "why": "mica.fast: the error of dx is 1"}]
    assert "- a cell: mica.fast: the error of dx is 1" in report.report(result)
