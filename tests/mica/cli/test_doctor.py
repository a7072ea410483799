"""``mica doctor``: what it finds on this machine and on faked ones, what it calls broken, and its JSON."""

import os
import subprocess
import sys

import pytest
import torch
import triton.language as tl

from mica.cli import doctor, main
from mica.fast import patching
from mica.kernels import common, runtime
from mica.paths.products import Slowdown
from tests.support.doctoring import text_under

pytestmark = pytest.mark.usefixtures("machine")


# Paths


def test_a_machine_without_a_gpu_works(run):
    status, report, lines = run()
    assert (status, report["problems"]) == (0, [])
    (cpu,) = report["devices"]
    assert (cpu["device"], cpu["threads"], cpu["path"]) == ("cpu", torch.get_num_threads(), "reference")
    assert "TRITON_INTERPRET=1" in cpu["reason"]
    assert cpu["trial"] == "not tried"
    assert text_under(lines, "kernels").startswith("none compiled: no GPU here")
    assert report["settings"] == {"MICA_BACKEND": None, "TRITON_INTERPRET": "1"}


def test_what_only_a_checkout_has_is_not_advised_elsewhere(run, monkeypatch, tmp_path):
    assert "make static" in text_under(run()[2], "kernels")
    (tmp_path / "mica").mkdir()
    monkeypatch.setattr("mica.__file__", str(tmp_path / "mica" / "__init__.py"))
    assert text_under(run()[2], "kernels") == "none compiled: no GPU here"


def test_products_of_the_cpu_are_in_words(run):
    _, report, lines = run()
    assert report["products"]["float16"] == {"x Wᵀ": 1.27, "dy W": 160.4, "busy": False, "native": False}
    took = "small ones: x Wᵀ takes {} times float32's time, dy W takes {} times float32's time"
    assert text_under(lines, "bf16 products") == took.format("0.5", "0.44")
    assert text_under(lines, "fp16 products") == (
        took.format("1.3", "160") + "; adapted layers go through float32, which --dtype auto takes"
    )


def test_products_that_a_busy_machine_hides(run, monkeypatch):
    monkeypatch.setattr("mica.paths.products.slowdown", lambda dtype: Slowdown(188.0, 188.0, is_busy=True))
    status, report, lines = run()
    assert (status, report["products"]["bfloat16"]["busy"]) == (0, True)
    hidden = "small ones: not measured, because other processes keep this machine busy"
    assert text_under(lines, "bf16 products") == hidden
    assert text_under(lines, "fp16 products").startswith(f"{hidden}; adapted layers go through float32")


def test_text_says_what_the_json_says(run, gpu, monkeypatch):
    gpu()
    _, report, lines = run()
    for row in report["versions"]:
        number, note = text_under(lines, row["name"]).split(maxsplit=1)
        assert number == row["version"]
        assert note == (f"ok, {report['torch_build']}" if row["name"] == "torch" else "ok")
    assert [row["name"] for row in report["versions"]][:2] == ["mica", "Python"]
    assert {"torch", "triton", "peft", "transformers"} <= {row["name"] for row in report["versions"]}
    assert text_under(lines, "MICA_BACKEND") == "auto (not set)"
    assert text_under(lines, "cuda:0") == "Some GPU, 80.0 GiB, compute capability 9.0, target sm_90"
    assert f"{torch.get_num_threads()} threads" in text_under(lines, "cpu")
    layers = [line[16:].strip() for line in lines if "MiCA layers" in line]
    assert layers == ["reference: no Triton kernels for devices of type 'cpu'", "kernel"]
    assert text_under(lines, "trial kernel") == "passed"
    assert text_under(lines, "PEFT") == f"mica.fast replaces {len(patching.PATCHES)} of its functions"
    assert [label for label in lines if label.startswith("kernels")] == []


@pytest.mark.parametrize(
    ("options", "architecture", "target"),
    [
        ({"capability": (9, 0)}, "compute capability 9.0", "sm_90"),
        ({"capability": (12, 0)}, "compute capability 12.0", "sm_120"),
    ],
)
def test_gpu_on_kernels(options, architecture, target, run, gpu):
    gpu(**options)
    status, report, _ = run()
    assert status == 0
    assert report["devices"][1] == {
        "device": "cuda:0",
        "name": "Some GPU",
        "memory_gib": 80.0,
        "architecture": architecture,
        "target": target,
        "path": "kernel",
        "reason": None,
        "trial": "passed",
    }
    assert report["torch_build"].startswith("CPU")


def test_gpu_of_rocm_takes_the_reference(run, gpu):
    gpu(why="no Triton kernels for ROCm", rocm="gfx942")
    status, report, _ = run()
    row = report["devices"][1]
    assert (status, row["architecture"], row["target"]) == (0, "gfx942", None)
    assert (row["path"], row["reason"]) == ("reference", "no Triton kernels for ROCm")
    assert row["trial"] == "not tried"
    assert report["torch_build"].startswith("ROCm 6.4")


def test_gpu_whose_trial_fails_is_broken(run, gpu):
    gpu(why="a trial kernel gave a wrong result on it")
    status, report, lines = run()
    assert status == 1
    assert report["problems"] == [
        "the kernels do not run on cuda:0: a trial kernel gave a wrong result on it"
    ]
    row = report["devices"][1]
    assert (row["path"], row["trial"]) == ("reference", "failed")
    assert text_under(lines, "trial kernel") == "failed"


def test_reference_on_a_gpu_by_choice_or_age_is_not_broken(run, gpu, monkeypatch):
    gpu(capability=(7, 5), why="older than compute capability 8.0")
    status, report, _ = run()
    row = report["devices"][1]
    assert (status, row["target"], row["path"], row["trial"]) == (0, "sm_75", "reference", "not tried")

    devices = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(runtime, "why_unavailable", devices.append)
    monkeypatch.setenv("MICA_BACKEND", "reference")
    status, report, _ = run()
    row = report["devices"][1]
    assert (status, row["path"], row["reason"]) == (0, "reference", "MICA_BACKEND=reference")
    assert (row["trial"], devices) == ("not tried", [])


def test_interpreted_kernels_are_not_called_compiled(run, gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(common, "INTERPRETED", tl.constexpr(True))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MICA_BACKEND", "triton")
    status, report, _ = run()
    row = report["devices"][1]
    assert (status, row["path"], row["trial"], row["target"]) == (0, "kernel", "not tried", None)


def test_kernels_that_are_demanded_and_missing(run, gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("MICA_BACKEND", "triton")
    status, report, lines = run()
    assert (status, report["devices"][0]["path"]) == (1, "error")
    assert "MICA_BACKEND=triton demands kernels" in lines[-1]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu()
    status, report, _ = run()
    assert (status, [row["path"] for row in report["devices"]]) == (0, ["error", "kernel"])


def test_gpu_that_cannot_be_opened(run, gpu, monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA error: all devices are busy\nCompile with TORCH_USE_CUDA_DSA")

    gpu()
    monkeypatch.setattr(torch.cuda, "get_device_properties", busy)
    status, report, lines = run()
    assert (status, report["devices"][1]["path"]) == (1, "error")
    assert "cannot run on cuda:0: RuntimeError: CUDA error: all devices are busy Compile" in lines[-1]


# Caches


def test_caches(run, monkeypatch, tmp_path):
    _, report, lines = run()
    assert (report["caches"]["folder"], text_under(lines, "cache")) == (None, "off")

    folder = tmp_path / "not" / "yet"
    monkeypatch.setenv("MICA_CACHE", str(folder))
    _, report, lines = run()
    assert report["caches"] == {"folder": str(folder), "is_writable": True, "distrusted": None}
    assert text_under(lines, "cache") == f"{folder}, writable"
    assert not folder.parent.exists()

    (tmp_path / "file").touch(0o777)
    monkeypatch.setenv("MICA_CACHE", str(tmp_path / "file"))
    status, report, lines = run()
    assert (status, report["caches"]["is_writable"]) == (0, False)
    assert text_under(lines, "cache").startswith(f"{tmp_path / 'file'}, not writable")


def test_cache_that_may_not_be_written(run, monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("MICA_CACHE", str(tmp_path / "cache"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    monkeypatch.setattr(doctor, "check_file", lambda *_: None)  # which checks the JSON's folder likewise
    assert run()[1]["caches"]["is_writable"] is False


# Refusals


def test_bad_backend_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MICA_BACKEND", "cuda")
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 2
    captured = capsys.readouterr()
    message = "MICA_BACKEND must be one of auto, triton, reference, but it is 'cuda'."
    assert (captured.out, captured.err) == ("", f"mica doctor: error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_bad_path_is_reported_before_anything_is_examined(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "examine", lambda: pytest.fail("the machine was examined"))
    assert main(["doctor", "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"mica doctor: error: --json {tmp_path}: exists and is not a file\n"


def test_help_needs_no_torch():
    code = (
        "import sys; from mica.cli import main; status = main(['doctor', '--help']); "
        "print(status, [name for name in ('torch', 'transformers', 'packaging') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 []"
    assert "--json" in result.stdout


def test_a_cache_that_others_can_write_is_not_called_writable(run, monkeypatch, tmp_path):
    monkeypatch.setenv("MICA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o755)
    assert text_under(run()[2], "cache").endswith("cache, writable")
    (tmp_path / "cache").chmod(0o777)
    assert text_under(run()[2], "cache").endswith("not used, because it can be written by others (mode 777)")
