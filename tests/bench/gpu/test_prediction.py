"""What the model writes before a run: rows that the run then measures, by the same names."""

from types import SimpleNamespace

from bench.gpu import __main__ as gpu
from bench.gpu import prediction
from bench.results.names import DEVICE_TIME
from bench.suites import bench_kernels, bench_layer
from mica.paths import choose

DEVICE = "NVIDIA H100 80GB HBM3"


def test_cells_of_the_suites_are_predicted(monkeypatch):
    """That a run then measures them by these names, the dry run with faults shows."""
    cells = [bench_kernels.Cell(kernel, 40, 64, 16) for kernel in bench_kernels.NAMES]
    monkeypatch.setattr(bench_kernels, "CELLS", cells)
    monkeypatch.setattr(choose.products, "has_native", lambda dtype: True)  # GPUs have 16-bit instructions
    monkeypatch.setattr(bench_layer, "CELLS", bench_layer.AXES)  # whatever this processor is too slow for
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
