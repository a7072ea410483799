"""``mica doctor``: what it finds on this machine and on faked ones, and what it calls broken."""

import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch

import mica.fast
from mica import native
from mica.cli import doctor, main
from mica.fast import patching
from mica.kernels import runtime
from mica.native import build
from mica.paths import choose, tuning
from tests.support.faults import raising

ON_A_CPU = f"reference: {runtime.ON_A_CPU}"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without a GPU, whose caches are the test's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("mica.paths.products.has_native", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(runtime, "tried", {})
    monkeypatch.setattr(choose, "_choices", {})
    monkeypatch.setattr(choose, "devices_without_kernels", set())
    monkeypatch.setenv("MICA_NATIVE", "0")  # nothing is compiled


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU of this compute capability (or ROCm architecture), and a trial's result."""

    def pretend(capability=(9, 0), trial=None, rocm=None):
        properties = SimpleNamespace(name="Some GPU", total_memory=80 << 30, gcnArchName=rocm)
        monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
        answers = {"is_available": True, "device_count": 1, "get_device_capability": capability}
        answers |= {"get_device_name": "Some GPU", "is_current_stream_capturing": False}
        for name, value in {**answers, "get_device_properties": properties}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(runtime, "trial", trial or (lambda device: None))

    return pretend


@pytest.fixture
def run(capsys):
    """Run the command; returns its problems, as the last line has them, and its findings by their labels."""

    def run():
        status = main(["doctor"])
        out, err = capsys.readouterr()
        assert err == ""
        *lines, last = out.splitlines()
        findings = {line[:16].strip(): line[16:].strip() for line in lines}
        assert len(findings) == len(lines)
        if status == 0:
            assert last == "everything that this machine can do works"
            return [], findings
        assert status == 1
        return last.removeprefix("broken: ").split("; "), findings

    return run


@pytest.fixture
def versions(monkeypatch):
    """Pretend that these are the installed versions; None: not installed."""

    def pretend(**others):
        def pretended(name):
            if others.get(name, "") is None:
                raise PackageNotFoundError(name)
            return others.get(name) or version(name)

        monkeypatch.setattr(doctor, "version", pretended)

    return pretend


@pytest.fixture
def patches(monkeypatch):
    """Replace the table of patches; what was installed with it must not stay for the tests to come."""
    mica.fast.uninstall()
    yield lambda *table: monkeypatch.setattr(patching, "PATCHES", table)
    mica.fast.uninstall()


# Devices and paths


@pytest.mark.parametrize(("number", "said"), [(1, "1 thread, may use 2"), (2, "2 threads, may use 2")])
def test_the_number_of_threads_is_shown_with_what_sets_it(number, said, run, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: number)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", str(number))
    _, findings = run()
    assert findings["cpu"] == f"{platform.machine()}, {said} of 8 processors"
    assert findings["OMP_NUM_THREADS"] == str(number)


def test_a_machine_without_a_gpu_works(run):
    problems, findings = run()
    assert problems == []
    assert {"mica", "Python", "torch", "triton", "peft", "transformers"} <= findings.keys()
    assert findings["torch"] == version("torch")
    assert findings["cpu: layers"] == ON_A_CPU
    slow = "the CPU has no instructions for float16: adapted layers compute in float32, which --dtype auto"
    assert findings["16-bit products"] == f"{slow} selects"
    assert findings["PEFT"] == f"mica.fast replaces {len(patching.PATCHES)} of its functions"
    assert findings["MICA_NATIVE"] == "0"
    assert "MICA_BACKEND" not in findings


def test_what_extras_and_recipes_use_is_listed_and_may_be_absent(run, versions):
    versions(trl=None, accelerate="1.10.0")
    problems, findings = run()
    assert (problems, findings["trl"], findings["accelerate"]) == ([], "not installed", "1.10.0")
    assert {"datasets", "gguf", "bitsandbytes"} <= findings.keys()


def test_what_was_measured_on_a_device_is_listed(run, gpu, monkeypatch, tmp_path):
    gpu()
    tuning.clear()
    _, findings = run()
    assert findings["cuda:0: measured"] == "nothing, because MICA_TUNE=0"
    monkeypatch.setenv("MICA_TUNE", str(tmp_path))
    monkeypatch.setattr(tuning, "device_name", lambda device: "Some GPU")
    tuning.clear()
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    kind = tuning.Kind(False, dtypes, 16, 4096, 4096, 512, has_dropout=False, is_aligned=True)
    forward = tuning.Part("split", {"reference": 121.0, "split": 100.0})
    layer = tuning.Layer(forward, tuning.Part("reference", {"reference": 9.0, "split": 18.0}), "2026-12-01")
    table = tuning.table(torch.device("cuda:0"))
    table.settle(kind, layer)
    tuning.clear()
    _, findings = run()
    assert findings["cuda:0: measured"] == f"kinds of layers: 1, in {table.path}"
    assert findings["cuda:0: kind 1"] == (
        f"{kind}: forward split, 1.21 times as fast as the reference path; "
        "backward reference, 2.00 times as fast as kernels (2026-12-01)"
    )
    tuning.clear()


def wrong(device):
    return "a trial kernel gave a wrong result on it"


NO_COMPILER = "a trial kernel failed on it: RuntimeError: no C compiler"
GPUS = {
    "Hopper": ({}, "auto", "9.0", "kernels"),
    "trial that fails": ({"trial": raising(RuntimeError("no C compiler"))}, "auto", "9.0", NO_COMPILER),
    "trial that is wrong": ({"trial": wrong}, "auto", "9.0", wrong(None)),
    "too old": (
        {"capability": (7, 5)},
        "auto",
        "7.5",
        "reference: Some GPU is older than compute capability 8.0",
    ),
    "ROCm": ({"rocm": "gfx942"}, "auto", "gfx942", "reference: no Triton kernels for ROCm"),
    "demanded": ({}, "triton", "9.0", "kernels"),
    "refused": ({"trial": pytest.fail}, "reference", "9.0", "reference: MICA_BACKEND=reference"),
}


@pytest.mark.parametrize(("options", "backend", "architecture", "layers"), GPUS.values(), ids=GPUS)
def test_gpu(options, backend, architecture, layers, run, gpu, monkeypatch):
    gpu(**options)
    monkeypatch.setenv("MICA_BACKEND", backend)
    problems, findings = run()
    broken = [f"the kernels do not run on cuda:0: {layers}"] * layers.startswith("a trial")
    assert problems == broken
    assert findings["cuda:0"].startswith("Some GPU, 80.0 GiB, ")
    assert findings["cuda:0"].endswith(architecture)
    assert findings["cuda:0: layers"] == (f"reference: {layers}" if broken else layers)
    assert findings["cpu: layers"].startswith("error: " if backend == "triton" else "reference: ")


# What is broken


NOT_KNOWN = "mica-fast is not installed, so the versions that it needs are not known"
BUSY = "CUDA error: all devices are busy Compile with TORCH_USE_CUDA_DSA"
PROBLEMS = {
    "torch warns of its GPU: old": (torch.cuda, "is_available", lambda: warnings.warn("old", stacklevel=1)),
    NOT_KNOWN: (doctor, "requires", raising(PackageNotFoundError("mica-fast"))),
    "PEFT: AttributeError: no LoraLayer": (patching, "install", raising(AttributeError("no LoraLayer"))),
    "C++: RuntimeError: no such symbol": (native, "module", raising(RuntimeError("no such\nsymbol"))),
    f"cuda:0: RuntimeError: {BUSY}": (torch.cuda, "get_device_properties", raising(RuntimeError(BUSY))),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_is_named(problem, run, gpu, monkeypatch):
    if problem.startswith("cuda"):
        gpu()
    monkeypatch.setattr(*PROBLEMS[problem])
    problems, findings = run()
    assert problems == [problem]
    assert "cache" in findings  # the last: a problem does not end the search


@pytest.mark.parametrize("package", ["torch", "peft", "triton"])
def test_version_out_of_range(package, run, versions):
    versions(torch="99.0.0a0+5228986c39")  # a prerelease within the range
    assert run()[0] == []
    versions(**{package: "0.1.0"})
    (problem,), findings = run()
    assert problem.startswith(f"{package} 0.1.0 is not among the supported versions, >=")
    assert findings[package] == "0.1.0"


def test_missing_requirement(run, versions, monkeypatch):
    versions(triton=None)
    problems, findings = run()
    assert problems == ["triton is not installed, and MiCA needs >=3.6"]
    assert "triton" not in findings
    needs = ["torch>=2.9", 'triton>=3.5; platform_system == "Nowhere"', 'x; extra == "cli"']
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    assert run()[0] == []


# C++, PEFT, the cache


def test_the_c_plus_plus_is_compiled_or_not_used_and_neither_is_broken(run, monkeypatch, tmp_path):
    unused = "not used, so Python calls PyTorch's operators, with the same results: "
    assert run()[1]["C++"] == f"{unused}MICA_NATIVE=0"
    refused = build.BuildError("nothing is compiled there")
    monkeypatch.setattr(build, "ensure_built", raising(refused))
    monkeypatch.setenv("MICA_NATIVE", str(tmp_path))
    problems, findings = run()
    assert (problems, findings["C++"]) == ([], f"{unused}{refused}")
    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(__file__=str(tmp_path / "x.so")))
    assert run()[1]["C++"] == f"calls PyTorch's operators; compiled in {tmp_path}"


def test_peft_mismatch_is_broken_and_named(run, patches, recwarn):
    first, second, *rest = [patch for patch in patching.PATCHES if patch.part is None]
    patches(first._replace(parameters="self something_else"), second._replace(name="nothing"), *rest)
    problems, findings = run()
    assert not patching.is_installed()
    assert not recwarn.list  # the findings say it
    first = f"{first.owner}.{first.name} takes ({first.parameters})"
    second = f"{second.owner}.nothing is not there"
    assert problems == [f"mica.fast leaves this PEFT as it is: {first}, {second}"]
    assert "PEFT" not in findings


def test_caches(run, monkeypatch, tmp_path):
    assert run()[1]["cache"] == "off"
    folder = tmp_path / "not" / "yet"
    monkeypatch.setenv("MICA_CACHE", str(folder))
    assert run()[1]["cache"] == str(folder)
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert run()[1]["cache"] == f"{folder}, not used, because it can be written by others (mode 777)"
