"""``mica doctor``: what it finds on this machine and on faked ones, what it calls broken, and its JSON."""

import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

import mica.fast
from mica.cli import doctor, main
from mica.fast import patching
from mica.kernels import common, runtime

RATIOS = {torch.bfloat16: (0.5, 0.44), torch.float16: (1.27, 160.4)}
WORKS = "everything that this machine can do works"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without a GPU, whose caches are the test's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("MICA_TUNE_FILE", str(tmp_path / "tuning.json"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("mica.products.slowdown", RATIOS.get)
    monkeypatch.setattr("mica.products.has_native", lambda dtype: dtype == torch.bfloat16)
    found_once = (common.target_of, runtime.triton_version, runtime._why_not_device)
    for function in found_once:
        function.cache_clear()
    yield
    for function in found_once:
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU of this compute capability (or ROCm architecture) and verdict."""

    def pretend(capability=(9, 0), why=None, rocm=None):
        found = SimpleNamespace(name="Some GPU", total_memory=80 << 30, gcnArchName=rocm)
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(common, "INTERPRETED", tl.constexpr(False))
        monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
        for name, value in (
            ("is_available", True),
            ("device_count", 1),
            ("get_device_capability", capability),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        no_kernels = "no Triton kernels for devices of type 'cpu'"
        monkeypatch.setattr(
            runtime, "why_unavailable", lambda device: why if device.type == "cuda" else no_kernels
        )

    return pretend


@pytest.fixture
def versions(monkeypatch):
    """Pretend that these are the installed versions; None: not installed."""

    def pretend(**others):
        def found(name):
            if others.get(name, "") is None:
                raise PackageNotFoundError(name)
            return others.get(name) or version(name)

        monkeypatch.setattr(doctor, "version", found)
        monkeypatch.setattr(doctor, "packages_distributions", dict)

    return pretend


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command; returns (status, JSON, lines)."""

    def run():
        file = tmp_path / "doctor.json"
        status = main(["doctor", "--json", str(file)])
        captured = capsys.readouterr()
        assert captured.err == ""
        lines = captured.out.splitlines()
        found = json.loads(file.read_text(encoding="utf-8"))
        assert (status, lines[-1] == WORKS) == ((1, False) if found["problems"] else (0, True))
        if status:
            assert lines[-1] == "broken: " + "; ".join(found["problems"])
        return status, found, lines

    return run


def said(lines, label) -> str:
    """What the text says under a label that it has once."""
    (text,) = [line[16:].strip() for line in lines if line[:16].strip() == label]
    return text


# Paths


def test_a_machine_without_a_gpu_works(run):
    status, found, lines = run()
    assert (status, found["problems"]) == (0, [])
    (cpu,) = found["devices"]
    assert (cpu["device"], cpu["threads"], cpu["path"]) == ("cpu", torch.get_num_threads(), "reference")
    assert "TRITON_INTERPRET=1" in cpu["reason"]
    assert cpu["trial"] == "not tried"
    assert said(lines, "kernels").startswith("none compiled: no GPU here")
    assert found["settings"] == {"MICA_BACKEND": None, "TRITON_INTERPRET": "1", "MICA_TUNE": None}


def test_what_only_a_checkout_has_is_not_advised_elsewhere(run, monkeypatch, tmp_path):
    assert "make static" in said(run()[2], "kernels")
    (tmp_path / "mica").mkdir()
    monkeypatch.setattr("mica.__file__", str(tmp_path / "mica" / "__init__.py"))
    assert said(run()[2], "kernels") == "none compiled: no GPU here"


def test_products_of_the_cpu_are_in_words(run):
    _, found, lines = run()
    assert found["products"]["float16"] == {"x Wᵀ": 1.27, "dy W": 160.4, "native": False}
    took = "small ones: x Wᵀ takes {} times float32's time, dy W takes {} times float32's time"
    assert said(lines, "bf16 products") == took.format("0.5", "0.44")
    assert said(lines, "fp16 products") == (
        took.format("1.3", "160") + "; adapted layers go through float32, which --dtype auto takes"
    )


def test_text_says_what_the_json_says(run, gpu, monkeypatch):
    gpu()
    monkeypatch.setenv("MICA_TUNE", "1")
    _, found, lines = run()
    for row in found["versions"]:
        number, note = said(lines, row["name"]).split(maxsplit=1)
        assert number == row["version"]
        assert note == (f"ok, {found['torch_build']}" if row["name"] == "torch" else "ok")
    assert [row["name"] for row in found["versions"]][:2] == ["mica", "Python"]
    assert {"torch", "triton", "peft", "transformers"} <= {row["name"] for row in found["versions"]}
    assert said(lines, "MICA_BACKEND") == "auto (not set)"
    assert said(lines, "MICA_TUNE") == "1"
    assert said(lines, "cuda:0") == "Some GPU, 80.0 GiB, compute capability 9.0, target sm_90"
    assert f"{torch.get_num_threads()} threads" in said(lines, "cpu")
    layers = [line[16:].strip() for line in lines if "MiCA layers" in line]
    assert layers == ["reference: no Triton kernels for devices of type 'cpu'", "kernel"]
    assert said(lines, "trial kernel") == "passed"
    assert said(lines, "PEFT") == f"mica.fast replaces {len(patching.PATCHES)} of its functions"
    assert [label for label in lines if label.startswith("kernels")] == []


@pytest.mark.parametrize(
    ("options", "architecture", "target"),
    [
        ({"capability": (9, 0)}, "compute capability 9.0", "sm_90"),
        ({"capability": (12, 0)}, "compute capability 12.0", "sm_120"),
        ({"capability": (6, 1), "rocm": "gfx90a:sramecc+:xnack-"}, "gfx90a:sramecc+:xnack-", "gfx90a"),
    ],
)
def test_gpu_on_kernels(options, architecture, target, run, gpu):
    gpu(**options)
    status, found, _ = run()
    assert status == 0
    assert found["devices"][1] == {
        "device": "cuda:0",
        "name": "Some GPU",
        "memory_gib": 80.0,
        "architecture": architecture,
        "target": target,
        "path": "kernel",
        "reason": None,
        "trial": "passed",
    }
    assert found["torch_build"].startswith("ROCm 6.4" if "rocm" in options else "CPU")


@pytest.mark.parametrize("options", [{}, {"capability": (6, 1), "rocm": "gfx942"}])
def test_gpu_whose_trial_fails_is_broken(options, run, gpu):
    gpu(why="a trial kernel gave a wrong result on it", **options)
    status, found, lines = run()
    assert status == 1
    assert found["problems"] == ["the kernels do not run on cuda:0: a trial kernel gave a wrong result on it"]
    row = found["devices"][1]
    assert (row["path"], row["trial"]) == ("reference", "failed")
    assert said(lines, "trial kernel") == "failed"


def test_reference_on_a_gpu_by_choice_or_age_is_not_broken(run, gpu, monkeypatch):
    gpu(capability=(7, 5), why="older than compute capability 8.0")
    status, found, _ = run()
    row = found["devices"][1]
    assert (status, row["target"], row["path"], row["trial"]) == (0, "sm_75", "reference", "not tried")

    gpu_asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(runtime, "why_unavailable", gpu_asked.append)
    monkeypatch.setenv("MICA_BACKEND", "reference")
    status, found, _ = run()
    row = found["devices"][1]
    assert (status, row["path"], row["reason"]) == (0, "reference", "MICA_BACKEND=reference")
    assert (row["trial"], gpu_asked) == ("not tried", [])


def test_interpreted_kernels_are_not_called_compiled(run, gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(common, "INTERPRETED", tl.constexpr(True))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MICA_BACKEND", "triton")
    status, found, _ = run()
    row = found["devices"][1]
    assert (status, row["path"], row["trial"], row["target"]) == (0, "kernel", "not tried", None)


def test_kernels_that_are_demanded_and_not_there(run, gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("MICA_BACKEND", "triton")
    status, found, lines = run()
    assert (status, found["devices"][0]["path"]) == (1, "error")
    assert "MICA_BACKEND=triton demands kernels" in lines[-1]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu()
    status, found, _ = run()
    assert (status, [row["path"] for row in found["devices"]]) == (0, ["error", "kernel"])


def test_gpu_that_cannot_be_opened(run, gpu, monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA error: all devices are busy\nCompile with TORCH_USE_CUDA_DSA")

    gpu()
    monkeypatch.setattr(torch.cuda, "get_device_properties", busy)
    status, found, lines = run()
    assert (status, found["devices"][1]["path"]) == (1, "error")
    assert "cannot run on cuda:0: RuntimeError: CUDA error: all devices are busy Compile" in lines[-1]


def test_driver_that_torch_warns_of(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("driver too old", stacklevel=1))
    status, found, _ = run()
    assert (status, found["problems"]) == (1, ["torch warns of its GPU: driver too old"])


# Versions


@pytest.mark.parametrize("package", ["torch", "transformers", "triton"])
def test_version_out_of_range(package, run, versions):
    versions(**{package: "0.1.0"})
    status, found, lines = run()
    assert status == 1
    (row,) = [row for row in found["versions"] if row["problem"]]
    assert found["problems"] == [row["problem"]]
    assert row["problem"].startswith(f"{package} 0.1.0 is not among the supported versions, >=")
    assert said(lines, package).startswith(f"0.1.0           {row['problem']}")


def test_peft_out_of_range_that_works_is_not_broken(run, versions):
    """As 0.20.0 is, which has MiCA and all that is patched."""
    versions(peft="0.20.0")
    status, found, lines = run()
    assert (status, found["problems"]) == (0, [])
    (row,) = [row for row in found["versions"] if row["note"]]
    assert (row["name"], row["version"], row["problem"]) == ("peft", "0.20.0", None)
    assert said(lines, "peft") == (
        "0.20.0          peft 0.20.0 is not among the supported versions, >=0.21: not tested, but all that "
        "mica.fast replaces is there"
    )


def test_peft_out_of_range_that_does_not_fit_is_broken(run, versions, uninstalled, monkeypatch):
    changed = patching.PATCHES[0]._replace(parameters="self something_else")
    monkeypatch.setattr(patching, "PATCHES", (changed, *patching.PATCHES[1:]))
    versions(peft="0.1.0")
    status, found, lines = run()
    assert status == 1
    assert found["problems"][0].startswith("peft 0.1.0 is not among the supported versions, >=")
    assert found["problems"][1].startswith("mica.fast leaves this PEFT as it is")
    assert said(lines, "peft") == f"0.1.0           {found['problems'][0]}"


def test_prerelease_within_the_range_is_ok(run, versions):
    versions(torch="99.0.0a0+5228986c39")
    assert run()[0] == 0


def test_python_out_of_range(run, monkeypatch):
    monkeypatch.setattr(doctor, "metadata", lambda name: {"Requires-Python": ">=99"})
    status, found, _ = run()
    numbers = ".".join(map(str, sys.version_info[:3]))
    assert status == 1
    assert found["problems"] == [f"Python {numbers} is not among the supported versions, >=99"]


def test_missing_dependency_ends_the_search(run, versions):
    versions(scipy=None)
    status, found, lines = run()
    assert (status, "devices" in found) == (1, False)
    assert found["problems"][0].startswith("scipy is not installed, and MiCA needs >=")
    assert said(lines, "scipy").startswith("not installed")


def test_torch_that_cannot_be_imported(run, monkeypatch):
    def missing(name):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", missing)
    status, found, _ = run()
    assert (status, "devices" in found) == (1, False)
    assert found["problems"] == [
        "torch cannot be imported: OSError: libcudart.so.12: cannot open shared object file"
    ]


def test_source_tree_that_is_not_installed(run, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    status, found, lines = run()
    assert (status, len(found["versions"])) == (1, 1)
    assert "mica-fast is not installed, so the versions that it needs are not known" in lines[-1]


def test_missing_triton(run, versions, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delenv("TRITON_INTERPRET")
    versions(triton=None)
    status, found, lines = run()
    assert (status, found["problems"]) == (1, ["triton is not installed, and MiCA needs >=3.5"])
    (cpu,) = found["devices"]
    assert (cpu["path"], cpu["reason"]) == ("reference", "Triton is not installed")
    assert "tuning_file" not in found["caches"]
    needs = ["torch>=2.9", 'triton>=3.5; platform_system == "Nowhere"', 'x; extra == "cli"']
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    status, found, lines = run()
    assert (status, len(found["versions"])) == (0, 4)
    assert said(lines, "triton") == "not installed   not needed on this system"


def test_triton_that_cannot_be_imported(run, monkeypatch):
    def broken(name):
        if name == "triton":
            raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(doctor, "import_module", broken)
    status, found, _ = run()
    assert (status, found["devices"][0]["path"]) == (1, "reference")
    assert found["problems"] == ["triton cannot be imported: ImportError: libtriton.so: undefined symbol"]


def test_triton_of_another_distribution_counts(run, versions, monkeypatch):
    versions(triton=None, **{"triton-rocm": triton.__version__})
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"triton": ["triton-rocm"]})
    status, found, _ = run()
    (row,) = [row for row in found["versions"] if row["name"] == "triton"]
    assert (status, row["version"], row["problem"]) == (0, triton.__version__, None)


# PEFT


@pytest.fixture
def uninstalled():
    """Before, and after: what was installed with a changed table must not stay for the tests to come."""
    mica.fast.uninstall()
    yield
    mica.fast.uninstall()


def test_peft_mismatch_is_broken_and_named(run, uninstalled, monkeypatch, recwarn):
    changed = patching.PATCHES[0]._replace(parameters="self something_else")
    gone = patching.PATCHES[1]._replace(name="nothing")
    monkeypatch.setattr(patching, "PATCHES", (changed, gone, *patching.PATCHES[2:]))
    status, found, lines = run()
    assert not patching.is_installed()
    assert not recwarn.list  # the findings say it
    assert (status, found["peft"]["patched"]) == (1, 0)
    first, second = found["peft"]["mismatches"]
    assert first == "peft.tuners.lora.layer:Linear.forward takes (self x *args **kwargs)"
    assert second == "peft.tuners.lora.layer:Embedding.nothing is not there"
    assert lines[-1] == f"broken: mica.fast leaves this PEFT as it is: {first}, {second}"
    assert [line[16:].strip() for line in lines if "mismatch" in line[:16]] == [first, second]


def test_optional_function_of_peft_may_be_missing(run, uninstalled, monkeypatch):
    optional = next(patch for patch in patching.PATCHES if not patch.required)
    rest = tuple(patch for patch in patching.PATCHES if patch is not optional)
    monkeypatch.setattr(patching, "PATCHES", (optional._replace(name="nothing"), *rest))
    status, found, _ = run()
    assert (status, found["peft"]["patched"]) == (0, len(rest))
    assert found["peft"]["mismatches"] == [f"{optional.owner}.nothing is not there (optional)"]


def test_peft_that_mica_fast_cannot_read(run, monkeypatch):
    def unknown():
        raise AttributeError("no LoraLayer")

    monkeypatch.setattr(patching, "install", unknown)
    status, found, _ = run()
    assert (status, found["peft"]["patched"]) == (1, 0)
    assert found["problems"] == ["mica.fast cannot be imported: AttributeError: no LoraLayer"]


# Caches


def test_caches(run, monkeypatch, tmp_path):
    _, found, lines = run()
    assert (found["caches"]["folder"], said(lines, "cache")) == (None, "off")
    assert said(lines, "tuning file") == f"{tmp_path / 'tuning.json'}, 0 entries"

    (tmp_path / "tuning.json").write_text('{"one": "split", "two": "fused"}')
    folder = tmp_path / "not" / "yet"
    monkeypatch.setenv("MICA_CACHE", str(folder))
    _, found, lines = run()
    assert found["caches"] == {
        "folder": str(folder),
        "is_writable": True,
        "distrusted": None,
        "tuning_file": str(tmp_path / "tuning.json"),
        "tuning_entries": 2,
    }
    assert said(lines, "cache") == f"{folder}, writable"
    assert said(lines, "tuning file").endswith("tuning.json, 2 entries")
    assert not folder.parent.exists()

    (tmp_path / "file").touch(0o777)
    monkeypatch.setenv("MICA_CACHE", str(tmp_path / "file"))
    status, found, lines = run()
    assert (status, found["caches"]["is_writable"]) == (0, False)
    assert said(lines, "cache").startswith(f"{tmp_path / 'file'}, not writable")


def test_cache_that_may_not_be_written(run, monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("MICA_CACHE", str(tmp_path / "cache"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    monkeypatch.setattr(doctor, "_check_file", lambda *_: None)  # it asks the same of the JSON's folder
    assert run()[1]["caches"]["is_writable"] is False


# Refusals


def test_bad_backend_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MICA_BACKEND", "cuda")
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 2
    captured = capsys.readouterr()
    told = "MICA_BACKEND must be one of auto, triton, reference, but it is 'cuda'."
    assert (captured.out, captured.err) == ("", f"mica doctor: error: {told}\n")
    assert list(tmp_path.iterdir()) == []


def test_bad_path_is_said_before_anything_is_examined(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_examine", lambda: pytest.fail("the machine was examined"))
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
    assert said(run()[2], "cache").endswith("cache, writable")
    (tmp_path / "cache").chmod(0o777)
    assert said(run()[2], "cache").endswith("not used, because it can be written by others (mode 777)")
