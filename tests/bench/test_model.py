"""The model's error is exactly what was put into synthetic results; whatever it prints is labelled."""

import json
import sys
from importlib import import_module

import pytest

model = import_module("bench.model")
model_error = import_module("bench.model_error")
initialisation_cost = import_module("bench.initialisation_cost")
kernel_cost = import_module("bench.kernel_cost")
step_cost = import_module("bench.step_cost")
architectures = import_module("bench.architectures")
results = import_module("bench.results")

CPU = kernel_cost.Device("cpu", tensor=8e11, fp32=2e11, bandwidth=1e10, gap=4e-6)
SMOLLM = architectures.ARCHITECTURES["smollm2-135m"]
LAYER = {"suite": "layer", "tokens": 1536, "out": 320, "in": 640, "rank": 16}
STEP = {"suite": "step", "model": "SmolLM2-135M", "tokens": 1024, "sequence": 512, "rank": 16}
INITIALISATION = {"suite": "initialisation", "model": "SmolLM2-135M", "dtype": "float32", "rank": 16}
# rival -> form in `kernel_cost`, by dtype
FORMS = {
    "bfloat16": {
        results.BARE: "bare frozen linear",
        results.STOCK: kernel_cost.STOCK,
        results.STOCK_16: "stock PEFT, bf16 adapters",
        results.ATEN: "aten control",
        results.FAST: "aten reference",
    },
    "float32": {
        results.BARE: "bare frozen linear",
        results.STOCK: kernel_cost.STOCK,
        results.ATEN: "aten control",
        results.FAST: "aten reference",
    },
}


def synthetic(slower=None):
    """Rates of `CPU`, and times that follow from them; those of a rival in ``slower`` times that factor."""
    slower, groups = slower or {}, []

    def add(axes, seconds):
        rivals = {name: results.Rival([value * slower.get(name, 1.0)] * 3) for name, value in seconds.items()}
        groups.append(results.Group(str(axes), axes, rivals))

    rates = {
        "bfloat16 product": (0.25, 2e11, 1.0),
        "float32 product": (2.0, 4e11, 1.0),
        "float64 product": (2.0, 2e11, 1.0),
        "copy": (0.5, 0.0, 5e9),
        "call": (4e-6, 16.0, 128.0),
    }
    for name, (seconds, flops, bytes_) in rates.items():
        rival = results.Rival([seconds * 2, seconds, seconds / 2], {"flops": flops, "bytes": bytes_})
        groups.append(results.Group(name, {"suite": "rate", "rate": name}, {"measured": rival}))
    for dtype, forms in FORMS.items():
        size = {"bfloat16": 2, "float32": 4}[dtype]
        layer = kernel_cost.Layer(1536, 320, 640, 16, "cpu", size=size)
        for part in ("forward", "backward"):
            us = {
                name: kernel_cost.FORMS[form](layer).microseconds(CPU)[part] for name, form in forms.items()
            }
            add({**LAYER, "dtype": dtype, "pass": part}, {name: value / 1e6 for name, value in us.items()})
        steps = step_cost.step_cost(SMOLLM, CPU, 1024, 512, 16, size)
        add({**STEP, "dtype": dtype}, {name: step.seconds for name, step in steps.items()})
    stock = sum(count * initialisation_cost.svd_flops(*one) for one, count in SMOLLM.weights().items())
    add(INITIALISATION, {results.STOCK: stock / (0.2 * 2e11), results.FAST: 1.0})
    return results.Result({"cpu": "none", "device": "cpu", "datetime": "2026"}, groups)


def errors(result):
    return {(one.suite, one.rival): one for one in model_error.modelled_errors(result)}


def test_rates_are_read_from_a_result_file():
    assert model_error.measured_device(synthetic()) == pytest.approx(CPU)
    assert model_error.measured_device(results.Result({}, [])) is None
    assert model_error.modelled_errors(results.Result({}, synthetic().groups[5:])) == []


def test_results_that_follow_the_model_have_no_error():
    found = errors(synthetic())
    ratio = f"{results.STOCK} ÷ {results.FAST}"
    layer = {("layer", name): 4 for name in (results.BARE, results.STOCK, results.ATEN, results.FAST, ratio)}
    step = {("step", name): 2 for name in (results.BARE, results.STOCK, results.FAST, ratio)}
    once = {
        ("layer", results.STOCK_16): 2,
        ("step", results.STOCK_16): 1,
        ("initialisation", results.STOCK): 1,
    }
    assert {key: one.cells for key, one in found.items()} == layer | step | once
    assert [one.worst for one in found.values()] == pytest.approx([0.0] * len(found))
    assert [one.median for one in found.values()] == pytest.approx([0.0] * len(found))


def test_a_perturbed_result_has_the_error_that_it_was_given():
    found = errors(synthetic({results.STOCK: 2.0, results.FAST: 1.25}))
    for suite in ("layer", "step"):
        assert found[suite, results.BARE].worst == pytest.approx(0)
        assert found[suite, results.STOCK].median == pytest.approx(0.5)
        assert found[suite, results.FAST].worst == pytest.approx(1 - 1 / 1.25)
        assert found[suite, f"{results.STOCK} ÷ {results.FAST}"].median == pytest.approx(1 - 1.25 / 2)
    assert found["initialisation", results.STOCK].median == pytest.approx(0.5)


def test_median_and_worst_over_the_cells():
    result = synthetic()
    layers = list(result.select(suite="layer"))
    for group, factor in zip(layers, (1.0, 2.0, 0.5, 0.8), strict=True):  # |1/f - 1|: 0, 0.5, 1, 0.25
        group.rivals[results.BARE].seconds = [factor * one for one in group.rivals[results.BARE].seconds]
    found = errors(result)["layer", results.BARE]
    assert (found.median, found.worst) == pytest.approx((0.375, 1.0))


def test_what_is_not_modelled_is_left_out():
    axes = {**LAYER, "dtype": "bfloat16", "pass": "forward"}
    assert model_error.layer_seconds(axes, results.COMPILED, CPU) is None
    assert model_error.step_seconds({**STEP, "dtype": "nf4"}, results.BARE, CPU) is None
    assert model_error.step_seconds({**STEP, "dtype": "float32", "model": "other"}, results.BARE, CPU) is None
    assert model_error.initialisation_seconds(INITIALISATION, results.FAST, CPU) is None


def test_lora_also_trains_b():
    axes = {**LAYER, "dtype": "bfloat16", "pass": "backward"}
    stock, lora = (model_error.layer_seconds(axes, name, CPU) for name in (results.STOCK, results.LORA))
    product = kernel_cost.Kernel(4 * (320 * 1536 + 1536 * 16 + 320 * 16), 2.0 * 1536 * 320 * 16, "fp32")
    assert lora - stock == pytest.approx(product.seconds(CPU))


def test_on_a_gpu_a_step_of_ours_is_grouped_and_a_layer_split():
    device = kernel_cost.DEVICES["h100"]
    axes = {**STEP, "dtype": "bfloat16"}
    steps = step_cost.step_cost(SMOLLM, device, 1024, 512, 16)
    assert model_error.step_seconds(axes, results.FAST, device) == steps[results.GROUPED].seconds
    layer = kernel_cost.ours(kernel_cost.Layer(1536, 320, 640, 16, "sm_90"), fused=False)
    seconds = model_error.layer_seconds(
        {**LAYER, "dtype": "bfloat16", "pass": "forward"}, results.FAST, device
    )
    assert 1e6 * seconds == pytest.approx(layer.microseconds(device)["forward"])


def test_svd_counted_by_hand():
    assert initialisation_cost.svd_flops(30, 30) == pytest.approx(28 / 3 * 30**3)
    assert initialisation_cost.svd_flops(60, 30) == pytest.approx(8 * 60 * 900 + 4 / 3 * 27000)
    # QR first
    assert initialisation_cost.svd_flops(30, 300) == pytest.approx(6 * 300 * 900 + 8 * 27000)
    tiny = architectures.Architecture(2, 64, 128, 4, 2, 304)
    flops = 2 * (
        2 * 28 / 3 * 64**3 + 2 * (8 * 64 * 32**2 + 4 / 3 * 32**3) + 3 * (8 * 128 * 64**2 + 4 / 3 * 64**3)
    )
    assert initialisation_cost.stock_seconds(tiny, 1e9, 0.5) == pytest.approx(flops / 5e8)


def test_initialisation_is_the_solvers_count_for_every_weight(monkeypatch, capsys):
    tiny = architectures.Architecture(3, 96, 128, 3, 1, 304)
    seen = []
    counted = initialisation_cost.solver_cost.modelled

    def modelled(shape, rank, batch, weak):
        seen.append((shape, batch, weak))
        return counted(shape, rank, batch, weak)

    monkeypatch.setattr(initialisation_cost.solver_cost, "modelled", modelled)
    monkeypatch.setattr(initialisation_cost, "batch_size", lambda *shape: 2)
    solved = initialisation_cost.ours(tiny, "h100", 4)
    assert seen == [((96, 96), 2, False), ((32, 96), 2, False), ((128, 96), 2, False), ((96, 128), 2, False)]
    assert [one.count for one in solved] == [6, 6, 6, 3]
    pair = counted((96, 128), 4, 2)
    assert solved[-1].flops == pytest.approx(1.5 * pair.flops.total())
    assert solved[-1].seconds == pytest.approx(1.5 * pair.seconds["h100"])
    assert "2 of 6 weights 96 x 96" in capsys.readouterr().err


def test_what_is_too_large_or_has_no_rates_says_so():
    large, small = architectures.ARCHITECTURES["llama-3.1-70b"], SMOLLM
    assert "8192" in initialisation_cost.why_not(large, "h100", 16)
    assert "mi300x" in initialisation_cost.why_not(small, "mi300x", 16)
    assert initialisation_cost.why_not(architectures.ARCHITECTURES["llama-3.1-8b"], "h100", 16) is None


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["model", *map(str, arguments)])
    model.main()
    return capsys.readouterr().out


def test_what_is_printed_and_written_is_labelled(monkeypatch, capsys, tmp_path):
    file = tmp_path / "model.json"
    text = run(monkeypatch, capsys, "--no-initialisation", "--tokens", 4096, "--rank", 8, "--json", file)
    assert text.startswith("MODELLED, not measured: llama-3.1-8b on h100, 4096 tokens")
    assert "\nno measured result for h100: error unknown\n" in text
    blocks = [block for block in text.split("\n\n") if "error unknown" not in block]
    assert all(block.startswith("MODELLED") for block in blocks)
    written = json.loads(file.read_text())
    assert written["label"] == "MODELLED, not measured"
    llama = architectures.ARCHITECTURES["llama-3.1-8b"]
    steps = step_cost.step_cost(llama, kernel_cost.DEVICES["h100"], 4096, 2048, 8)
    assert written["step"] == {name: step._asdict() for name, step in steps.items()}
    for name, step in steps.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name:<40}")]
        assert line[42:].split()[0] == f"{1e3 * step.seconds:.1f}"
        assert line[42:].split()[2] == f"{steps[results.STOCK].seconds / step.seconds:.2f}"


def test_measured_rates_and_errors_on_the_command_line(monkeypatch, capsys, tmp_path):
    file = tmp_path / "rates.json"
    synthetic({results.STOCK: 2.0}).save(file)
    options = ("--device", "measured", "--model", "smollm2-135m", "--results", file, "--dtype", "float32")
    text = run(monkeypatch, capsys, *options)
    assert "measured, " in text
    assert "0.8 TF/s bf16, 0.2 TF/s fp32, 0.01 TB/s, 4 us a launch" in text
    assert "mica.fast: not modelled, the host solves there" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("  step") and " ÷ " not in line]
    assert [row[-3:] for row in rows] == [
        ["0.0%", "0.0%", "2"],
        ["50.0%", "50.0%", "2"],
        ["0.0%", "0.0%", "1"],
        ["0.0%", "0.0%", "2"],
    ]


def test_times_of_a_gpu_are_compared(monkeypatch, capsys, tmp_path):
    device = kernel_cost.DEVICES["h100"]
    layer = kernel_cost.Layer(8192, 4096, 4096, 16, "sm_90")
    times = {
        rival: {
            part: {"us": factor * kernel_cost.FORMS[form](layer).microseconds(device)[part]}
            for part in ("forward", "backward")
        }
        for rival, form, factor in (("bare GEMM", "bare frozen linear", 1.0), ("mica split", "split", 4.0))
    }
    folder = tmp_path / "nvidia-h100"
    folder.mkdir()
    raw = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "rank": 16}
    raw["shapes"] = {"8192x4096x4096": {"times": times}, "512x4096x4096": {"wrong": ["y"]}}
    (folder / "gpu.json").write_text(json.dumps(raw))
    found = {one.rival: one for one in model_error.gpu_errors("h100", tmp_path)}
    assert found["bare GEMM"].worst == pytest.approx(0)
    assert (found["mica split"].median, found["mica split"].cells) == (pytest.approx(0.75), 2)
    assert model_error.gpu_errors("a100", tmp_path) == []
    errors = model_error.gpu_errors("h100", tmp_path)
    monkeypatch.setattr(model, "gpu_errors", lambda name: errors)
    text = run(monkeypatch, capsys, "--no-initialisation")
    assert "MODELLED against measured: h100" in text
    assert "error unknown" not in text


def test_the_names_of_gpu_forms_exist():
    gpu_layer = import_module("bench.gpu_layer")
    named = {gpu_layer.BARE, *gpu_layer.FORMS, gpu_layer.STOCK, gpu_layer.STOCK_16}
    assert model_error.GPU_FORMS.keys() <= named
    assert set(model_error.GPU_FORMS.values()) <= kernel_cost.FORMS.keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "llama-9"), "invalid choice: 'llama-9'"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--dtype", "float32"), "the kernels are modelled with bfloat16 only"),
    ],
)
def test_what_is_unknown_is_refused_in_a_sentence(monkeypatch, capsys, options, said):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *options)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_measured_rates_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setattr(model, "newest_rates", lambda: None)
    with pytest.raises(SystemExit, match="needs a result file with rates"):
        run(monkeypatch, capsys, "--device", "measured")


def test_the_newest_rates_are_taken(tmp_path):
    for name, date in (("a", "2026-01-02"), ("b", "2026-01-01")):
        (tmp_path / name).mkdir()
        result = synthetic()
        result.machine["datetime"] = date
        result.save(tmp_path / name / "run.json")
    (tmp_path / "modelled").mkdir()
    (tmp_path / "modelled" / "other.json").write_text("{}")
    assert model_error.newest_rates(tmp_path) == tmp_path / "a" / "run.json"
    assert model_error.newest_rates(tmp_path / "a") is None
