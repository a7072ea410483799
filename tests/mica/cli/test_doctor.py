"""``mica doctor``: what it finds on this machine and on faked ones, what it calls broken, and its JSON."""

import json
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import peft
import pytest
import torch
import triton.language as tl

import mica.fast
from mica import native
from mica.cli import doctor, main
from mica.fast import patching
from mica.kernels import common, runtime
from mica.native import build

WORKS = "everything that this machine can do works"
HOPPER = {"device": "cuda:0", "name": "Some GPU", "memory_gib": 80.0, "target": "sm_90"}
HOPPER |= {"architecture": "compute capability 9.0", "path": "kernel", "reason": None, "trial": "passed"}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without a GPU, whose caches are the test's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("mica.paths.products.has_native", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(runtime, "tried", {})
    monkeypatch.setenv("MICA_NATIVE", "0")  # nothing is compiled
    found_once = (common.target_of, runtime.triton_version)
    for function in found_once:
        function.cache_clear()
    yield
    for function in found_once:
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU of this compute capability (or ROCm architecture) and verdict.

    Returns the devices that a verdict is asked for.
    """

    def pretend(capability=(9, 0), why=None, rocm=None, interpreted=False):
        asked = []
        verdicts = {"cuda": why, "cpu": "on a CPU the reference path is the fast one"}
        properties = SimpleNamespace(name="Some GPU", total_memory=80 << 30, gcnArchName=rocm)
        monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        monkeypatch.setattr(common, "INTERPRETED", tl.constexpr(interpreted))
        monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
        answers = {"is_available": True, "device_count": 1, "get_device_capability": capability}
        for name, value in {**answers, "get_device_properties": properties}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

        def verdict(device):
            asked.append(device)
            return verdicts[device.type]

        monkeypatch.setattr(runtime, "why_unavailable", verdict)
        return asked

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
        report = json.loads(file.read_text(encoding="utf-8"))
        broken = "broken: " + "; ".join(report["problems"])
        assert (status, lines[-1]) == ((1, broken) if report["problems"] else (0, WORKS))
        return status, report, lines

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


def text_under(lines, label) -> str:
    """What the text says under a label that it has once."""
    (text,) = [line[16:].strip() for line in lines if line[:16].strip() == label]
    return text


def raising(error, only=None):
    def function(name=None):
        if only in (None, name):
            raise error

    return function


# Devices and paths


def test_a_machine_without_a_gpu_works(run):
    status, report, lines = run()
    assert (status, report["problems"]) == (0, [])
    (cpu,) = report["devices"]
    assert (cpu["device"], cpu["threads"], cpu["path"]) == ("cpu", torch.get_num_threads(), "reference")
    assert "TRITON_INTERPRET=1" in cpu["reason"]
    assert cpu["trial"] == "not tried"
    assert text_under(lines, "kernels") == "none compiled: no GPU here"
    assert report["settings"] == {"MICA_BACKEND": None, "TRITON_INTERPRET": "1"}


def test_products_of_the_cpu_are_in_words(run):
    status, report, lines = run()
    assert (status, report["products"]) == (0, {"bfloat16": True, "float16": False})
    assert text_under(lines, "bf16 products") == "by the processor's own instructions"
    assert text_under(lines, "fp16 products") == (
        "no instructions: adapted layers compute in float32, which --dtype auto selects"
    )


def test_text_says_what_the_json_says(run, gpu):
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
    assert layers == ["reference: on a CPU the reference path is the fast one", "kernel"]
    assert text_under(lines, "PEFT") == f"mica.fast replaces {len(patching.PATCHES)} of its functions"
    assert [label for label in lines if label.startswith("kernels")] == []


def on_reference(reason, trial="not tried", **changes):
    return {"path": "reference", "reason": reason, "trial": trial, **changes}


WRONG, OLD = "a trial kernel gave a wrong result on it", "older than compute capability 8.0"
ROCM = "no Triton kernels for ROCm"
DEMANDED, REFUSED = {"MICA_BACKEND": "triton"}, {"MICA_BACKEND": "reference"}
SM_75 = {"architecture": "compute capability 7.5", "target": "sm_75"}
SM_120 = {"architecture": "compute capability 12.0", "target": "sm_120"}
GPUS = {
    "Hopper": ({}, {}, {}),
    "Blackwell": ({"capability": (12, 0)}, {}, SM_120),
    "ROCm": ({"why": ROCM, "rocm": "gfx942"}, {}, on_reference(ROCM, architecture="gfx942", target=None)),
    "trial that fails": ({"why": WRONG}, {}, on_reference(WRONG, "failed")),
    "too old": ({"capability": (7, 5), "why": OLD}, {}, on_reference(OLD, **SM_75)),
    "demanded": ({}, DEMANDED, {}),
    "refused": ({}, REFUSED, on_reference("MICA_BACKEND=reference")),
    "interpreted": ({"interpreted": True}, DEMANDED, {"target": None, "trial": "not tried"}),
}


@pytest.mark.parametrize(("options", "environment", "changes"), GPUS.values(), ids=GPUS)
def test_gpu(options, environment, changes, run, gpu, monkeypatch):
    asked = gpu(**options)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, report, lines = run()
    cpu, row = report["devices"]
    assert row == HOPPER | changes
    assert text_under(lines, "trial kernel") == row["trial"]
    is_broken = row["trial"] == "failed"
    assert report["problems"] == [f"the kernels do not run on cuda:0: {row['reason']}"] * is_broken
    assert report["torch_build"].startswith("ROCm 6.4" if "rocm" in options else "CPU")
    assert (cpu["path"] == "error") == (environment == DEMANDED)
    assert bool(asked) == (environment != REFUSED)


def test_kernels_that_are_demanded_and_missing(run, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("MICA_BACKEND", "triton")
    status, report, lines = run()
    assert (status, report["devices"][0]["path"]) == (1, "error")
    assert "MICA_BACKEND=triton demands kernels" in lines[-1]


def test_gpu_that_cannot_be_opened(run, gpu, monkeypatch):
    gpu()
    busy = RuntimeError("CUDA error: all devices are busy\nCompile with TORCH_USE_CUDA_DSA")
    monkeypatch.setattr(torch.cuda, "get_device_properties", raising(busy))
    status, report, lines = run()
    assert (status, report["devices"][1]["path"]) == (1, "error")
    assert "cannot run on cuda:0: RuntimeError: CUDA error: all devices are busy Compile" in lines[-1]


# C++


def test_the_c_plus_plus_is_compiled_or_not_used_and_neither_is_broken(run, monkeypatch, tmp_path):
    _, report, lines = run()
    assert report["native"] == {"folder": None, "why_not": "MICA_NATIVE=0"}
    unused = "not used, so Python calls PyTorch's operators, with the same results: "
    assert text_under(lines, "C++") == f"{unused}MICA_NATIVE=0"

    def refused(folder, sources):
        raise build.BuildError(f"nothing is compiled in {folder}")

    monkeypatch.setattr(build, "ensure_built", refused)
    monkeypatch.setenv("MICA_NATIVE", str(tmp_path))
    status, report, lines = run()
    assert (status, report["problems"]) == (0, [])
    assert text_under(lines, "C++") == f"{unused}nothing is compiled in {tmp_path}"

    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(__file__=str(tmp_path / "x.so")))
    monkeypatch.setattr(native, "why_not", lambda: None)
    status, report, lines = run()
    assert (status, report["native"]) == (0, {"folder": str(tmp_path), "why_not": None})
    assert text_under(lines, "C++") == f"calls PyTorch's operators; compiled in {tmp_path}"


def test_a_surprise_of_the_c_plus_plus_is_broken(run, monkeypatch):
    monkeypatch.setattr(native, "module", raising(RuntimeError("no such\nsymbol")))
    status, report, lines = run()
    assert (status, report["problems"]) == (1, ["the C++ cannot be examined: RuntimeError: no such symbol"])
    assert text_under(lines, "C++") == "unknown"


# Versions and what is missing


NO_FILE, NO_CLASS = OSError("libcudart.so.12: cannot open"), AttributeError("no LoraLayer")
NOT_KNOWN = "mica-fast is not installed, so the versions that it needs are not known"
PROBLEMS = {
    "torch warns of its GPU: old": (torch.cuda, "is_available", lambda: warnings.warn("old", stacklevel=1)),
    f"torch cannot be imported: OSError: {NO_FILE}": (doctor, "import_module", raising(NO_FILE, "torch")),
    f"triton cannot be imported: OSError: {NO_FILE}": (doctor, "import_module", raising(NO_FILE, "triton")),
    NOT_KNOWN: (doctor, "requires", raising(PackageNotFoundError("mica-fast"))),
    f"mica.fast cannot be imported: AttributeError: {NO_CLASS}": (patching, "install", raising(NO_CLASS)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_is_named(problem, run, monkeypatch):
    monkeypatch.setattr(*PROBLEMS[problem])
    _, report, _ = run()
    assert report["problems"] == [problem]
    assert (len(report["versions"]) == 1) == (problem == NOT_KNOWN)
    if problem.startswith("torch cannot"):
        assert "devices" not in report
    else:
        assert [row["path"] for row in report["devices"]] == ["reference"]
        assert (report["peft"]["patched"] == 0) == problem.startswith("mica.fast")


@pytest.mark.parametrize("package", ["torch", "transformers", "peft", "triton", "Python"])
def test_version_out_of_range(package, run, versions, monkeypatch):
    versions(torch="99.0.0a0+5228986c39")  # a prerelease within the range
    assert run()[0] == 0
    versions(**{package: "0.1.0"})
    number, needs = "0.1.0", ">="
    if package == "Python":
        number, needs = ".".join(map(str, sys.version_info[:3])), ">=99"
        monkeypatch.setattr(doctor, "metadata", lambda name: {"Requires-Python": needs})
    _, report, lines = run()
    (row,) = [row for row in report["versions"] if row["problem"]]
    assert report["problems"] == [row["problem"]]
    assert row["problem"].startswith(f"{package} {number} is not among the supported versions, {needs}")
    assert text_under(lines, package).startswith(f"{number:14}  {row['problem']}")


def test_missing_dependency_ends_the_search(run, versions):
    versions(scipy=None)
    _, report, lines = run()
    assert "devices" not in report
    assert report["problems"][0].startswith("scipy is not installed, and MiCA needs >=")
    assert text_under(lines, "scipy").startswith("not installed")


def test_missing_triton(run, versions, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delenv("TRITON_INTERPRET")
    versions(triton=None)
    _, report, lines = run()
    assert report["problems"] == ["triton is not installed, and MiCA needs >=3.5"]
    (cpu,) = report["devices"]
    assert (cpu["path"], cpu["reason"]) == ("reference", "on a CPU the reference path is the fast one")
    needs = ["torch>=2.9", 'triton>=3.5; platform_system == "Nowhere"', 'x; extra == "cli"']
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    status, report, lines = run()
    assert (status, len(report["versions"])) == (0, 4)
    assert text_under(lines, "triton") == "not installed   not needed on this system"


# PEFT


def test_peft_mismatch_is_broken_and_named(run, patches, recwarn):
    first, second, *rest = [patch for patch in patching.PATCHES if patch.part is None]
    patches(first._replace(parameters="self something_else"), second._replace(name="nothing"), *rest)
    _, report, lines = run()
    assert not patching.is_installed()
    assert not recwarn.list  # the findings say it
    assert report["peft"]["patched"] == 0
    first, second = report["peft"]["mismatches"]
    assert first == "peft.tuners.tuners_utils:BaseTuner.forward takes (self *args **kwargs)"
    assert second == "peft.peft_model:PeftModel.nothing is not there"
    assert lines[-1] == f"broken: mica.fast leaves this PEFT as it is: {first}, {second}"
    assert [line[16:].strip() for line in lines if "mismatch" in line[:16]] == [first, second]


def test_optional_function_of_peft_may_be_missing(run, patches):
    optional = next(patch for patch in patching.PATCHES if not patch.required)
    rest = [patch for patch in patching.PATCHES if patch is not optional]
    patches(optional._replace(name="nothing"), *rest)
    status, report, _ = run()
    assert (status, report["peft"]["patched"]) == (0, len(rest))
    assert report["peft"]["mismatches"] == [f"{optional.owner}.nothing is not there (optional)"]


def test_a_part_that_differs_is_left_to_peft_and_nothing_is_broken(run, patches):
    first, *rest = patching.PATCHES
    patches(first._replace(parameters="self something_else"), *rest)
    status, report, lines = run()
    assert (status, lines[-1]) == (0, WORKS)
    reason = "peft.tuners.lora.layer:Linear.forward takes (self x *args **kwargs)"
    assert report["peft"]["mismatches"] == [f"{reason} ({first.part})"]
    assert report["peft"]["patched"] == len(rest)
    assert text_under(lines, "note") == report["peft"]["note"]
    assert f"PEFT's own code runs {first.part}, because {reason}; " in report["peft"]["note"]


def test_a_release_of_peft_that_is_not_known_is_no_fault(run, patches, monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    status, report, lines = run()
    assert (status, lines[-1], report["peft"]["mismatches"]) == (0, WORKS, [])
    assert text_under(lines, "note").startswith("mica.fast with PEFT 0.22.0, which it does not know (")
    assert text_under(lines, "note").endswith("so all of it runs on this backend.")
    assert text_under(lines, "peft").endswith("see PEFT below")


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


def test_cache_that_others_may_write_or_nobody(run, monkeypatch, tmp_path):
    monkeypatch.setenv("MICA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o755)
    assert text_under(run()[2], "cache").endswith("cache, writable")
    (tmp_path / "cache").chmod(0o777)
    assert text_under(run()[2], "cache").endswith("not used, because it can be written by others (mode 777)")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    monkeypatch.setattr(doctor, "check_file", lambda *_: None)  # which checks the JSON's folder likewise
    assert run()[1]["caches"]["is_writable"] is False


# Refusals


BACKENDS = "must be one of auto, triton, reference, but it is 'much'.\n"


@pytest.mark.parametrize(("name", "message"), [("MICA_BACKEND", BACKENDS), ("MICA_CACHE_SIZE", "")])
def test_bad_setting_is_one_line(name, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "much")
    monkeypatch.setenv("MICA_CACHE", str(tmp_path))
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith(f"mica doctor: error: {name} {message}")
    assert list(tmp_path.iterdir()) == []


def test_bad_path_is_reported_before_anything_is_examined(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "examine", lambda: pytest.fail("the machine was examined"))
    assert main(["doctor", "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"mica doctor: error: --json {tmp_path}: exists and is not a file\n"
