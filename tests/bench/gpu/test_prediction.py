"""What the model writes before a run: rows that the run then measures, by the same names."""

from types import SimpleNamespace

import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import prediction, roofline
from bench.gpu.roofline import Layer
from bench.measure.peaks import PEAKS
from bench.results import names
from bench.results.names import BACKWARD, BARE, DEVICE_TIME, FAST, FORWARD
from bench.suites import bench_kernels
from mica.kernels import configs
from mica.paths import choose

DEVICE = "NVIDIA H100 80GB HBM3"
PEAK = PEAKS[DEVICE]
AXES = {"suite": "layer", "tokens": 8192, "out": 4096, "in": 4096, "rank": 16, "dtype": "bfloat16"}
LAYER = Layer(8192, 4096, 4096, 16, PEAK.cache)


def predicted(implementation, part=FORWARD, **axes):
    return prediction.of_layer({**AXES, "pass": part, **axes}, implementation, DEVICE)


@pytest.mark.parametrize("adapter", [names.MICA, names.PLAIN_LORA])
@pytest.mark.parametrize("part", [FORWARD, BACKWARD])
def test_each_implementation_of_a_layer_is_that_of_the_model(part, adapter):
    layer = LAYER._replace(trains_B=adapter == names.PLAIN_LORA)
    launches = {
        BARE: roofline.bare(layer, part),
        names.STOCK: roofline.stock(layer, part),
        names.STOCK_16: roofline.stock(layer._replace(has_masters=False), part),
    }
    launches |= {names.of_form(word): roofline.of_form(word, layer, part) for word in configs.FORM_NAMES}
    for name, expected in launches.items():
        assert predicted(name, part, suite="forms", adapter=adapter) == roofline.predict(expected, PEAK)


def test_mica_fast_is_predicted_in_the_form_that_it_takes():
    """Kernels are demanded, and nothing is known of the device."""
    assert predicted(FAST) == roofline.predict(roofline.of_form("split", LAYER, FORWARD), PEAK)


def test_cells_of_the_suites_are_predicted(monkeypatch):
    """That a run then measures them by these names, the dry run with faults shows."""
    cells = [bench_kernels.Cell(kernel, 40, 64, 16) for kernel in bench_kernels.NAMES]
    monkeypatch.setattr(bench_kernels, "CELLS", cells)
    monkeypatch.setattr(choose.products, "has_native", lambda dtype: True)  # GPUs have 16-bit instructions
    choose.clear()
    rows = [(one["group"], one["implementation"]) for one in prediction.records(DEVICE)]
    for cell in cells:
        copy, default, *_, cublas = bench_kernels.implementations(cell)
        assert rows[:3] == [(f"{cell.name}, {DEVICE_TIME}", name) for name in (copy, default, cublas)]
        del rows[:3]
    assert rows
    assert all(group.startswith("layer, ") and "dropout" not in group for group, _ in rows)


def test_a_run_goes_on_without_a_prediction(tmp_path, monkeypatch, capfd):
    def fails(command, env, **options):
        assert command[-1] == DEVICE
        assert env["MICA_BACKEND"] == "triton"
        raise gpu.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(gpu.subprocess, "run", fails)
    for device in ("a card", DEVICE):
        gpu.predict(SimpleNamespace(file=tmp_path / "run.json", machine={"device": device}), False)
    unknown, failed = capfd.readouterr().out.splitlines()
    assert unknown == "no prediction: bench/measure/peaks.py does not have a card"
    assert failed.startswith("no prediction: ")
