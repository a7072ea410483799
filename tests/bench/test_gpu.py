"""`make gpu` without a GPU: the whole script on tiny shapes, and the parts of its judgement."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_group, gpu_layer, gpu_report, gpu_timing
from bench.suites.layer import exact, make_layer, relative_errors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--output", folder, "--name", "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_runs_and_says_that_it_measured_nothing(dry_run):
    folder, text = dry_run
    assert sorted(file.name for file in folder.iterdir()) == ["run.json", "run.md", "run.png"]
    assert "Its times are not measurements" in text
    result = json.loads((folder / "run.json").read_text())
    assert result["machine"]["device"].startswith("dry run")
    ((shape, entry),) = result["shapes"].items()
    assert shape == "40x48x64"
    assert not entry["wrong"]
    assert not result["group"]["wrong"]
    assert list(result["group"]["times"]) == [
        gpu_group.BARE,
        gpu_group.ALONE,
        gpu_group.GROUPED,
        gpu_layer.STOCK_16,
    ]
    assert "q/k/v" in text
    assert list(entry["times"]) == [
        gpu_layer.BARE,
        *gpu_layer.FORMS,
        gpu_layer.STOCK,
        gpu_layer.STOCK_16,
    ]
    assert list(result["kernels"][shape]) == ["h = x Aᵀ", "g = dy B", "y += h Bᵀ", "dA = gᵀ x", "copy"]
    assert entry["times"][gpu_layer.BARE]["both"]["extra"] == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch sees none here" in done.stderr


def test_logs_of_the_tests_have_no_names_that_others_could_take(monkeypatch):
    names = []

    class Finished:
        def __init__(self, command, stdout, stderr, **options):
            names.append(os.fstat(stdout.fileno()).st_nlink)
            stdout.write(f"{Path(command[-1]).name}\n1 passed\n")

        def wait(self, timeout):
            return 0

    monkeypatch.setattr(gpu.subprocess, "Popen", Finished)
    found = gpu.device_tests()
    assert {test["last_line"] for test in found} == {"1 passed"}
    assert len({test["file"] for test in found}) == len(found) == len(names) > 5
    assert set(names) == {0}


@pytest.fixture
def layer():
    return make_layer(20, 24, 32, 4, torch.bfloat16, "cpu")


def test_a_wrong_result_gets_no_time(layer, monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "triton")
    found = gpu_layer.rivals(layer, compiled=False)
    assert not gpu.judge(layer, found, "cpu")["wrong"]
    right = found[gpu_layer.SPLIT].forward
    found[gpu_layer.SPLIT].forward = lambda: right() * 1.02
    ((*_, first),) = [gpu.judge(layer, found, "cpu")["wrong"]]
    assert first.startswith("mica split: error of")
    found[gpu_layer.SPLIT].forward = lambda: right() + torch.randn(()).bfloat16() * 1e-2
    assert "mica split: a rerun gave other bits" in gpu.judge(layer, found, "cpu")["wrong"]


def test_stock_is_the_same_arithmetic(layer):
    found = gpu_layer.rivals(layer, compiled=False)
    truth = exact(layer)

    def errors(rival):
        return relative_errors(rival.run, lambda y: rival.gradients(y, layer.grad_output), truth)

    for name in (gpu_layer.STOCK, gpu_layer.STOCK_16):
        for what, value in errors(found[name]).items():
            assert value <= 2e-2, (name, what)
    assert errors(found[gpu_layer.BARE])["y"] > 2e-2  # no adapter in it


def test_the_bytes_of_a_launch(layer):
    from mica.kernels.up_projection import plan_up_projection

    base, h, factor = torch.zeros(20, 24), torch.zeros(20, 16), torch.zeros(16, 24)
    out, launch = plan_up_projection(base, h, factor).bound()
    assert gpu_timing.launch_bytes(launch, out) == 4 * (2 * 20 * 24 + 20 * 16 + 16 * 24)


def test_a_wrong_group_gets_no_time(monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "triton")
    gate = {"y": 1e-2, "dx": 1e-2, "dA": 1e-2}
    assert gpu_group.measure_group((20, 24, 32), 4, torch.bfloat16, "cpu", 1, gate)["times"]
    real = gpu_group.mica_linear_group
    monkeypatch.setattr(gpu_group, "mica_linear_group", lambda *args: [y * 1.02 for y in real(*args)])
    found = gpu_group.measure_group((20, 24, 32), 4, torch.bfloat16, "cpu", 1, gate)
    assert found["wrong"][0].startswith("mica, grouped: error of y")
    assert not found["times"]


def test_the_table_of_what_was_asked(dry_run):
    result = json.loads((dry_run[0] / "run.json").read_text())
    assert gpu_report.acceptance(result) == []  # not the shape that the limits are for
    for part in ("shapes", "kernels"):
        result[part] = {gpu_report.MAIN_SHAPE: copy.deepcopy(result[part]["40x48x64"])}
    times = result["shapes"][gpu_report.MAIN_SHAPE]["times"]
    times[gpu_layer.SPLIT]["forward"]["extra"] = 0.2
    times[gpu_layer.SPLIT]["backward"]["extra"] = 0.4
    times[gpu_layer.SPLIT]["both"]["us"] = 100.0
    times[gpu_layer.STOCK]["both"]["us"] = 160.0
    met = {what: met for what, _, _, met in gpu_report.acceptance(result)}
    assert met["split, extra forward"]
    assert not met["split, extra backward"]
    assert met["stock PEFT default ÷ split"]
    result["group"]["times"][gpu_group.GROUPED]["both"]["extra"] = 0.151
    met = {what: met for what, _, _, met in gpu_report.acceptance(result)}
    assert not met["grouped q/k/v, extra forward + backward"]
    times[gpu_layer.STOCK]["both"]["us"] = 159.0
    met = {what: met for what, _, _, met in gpu_report.acceptance(result)}
    assert not met["stock PEFT default ÷ split"]
    assert "split, extra backward | ≤ 0.35 | 0.4 | NO" in gpu_report.report(result)
