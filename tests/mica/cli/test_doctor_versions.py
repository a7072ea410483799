"""``mica doctor`` and the versions of what it needs: too old, too new, missing, broken."""

import sys
import warnings
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
import torch
import triton
from packaging.requirements import Requirement

import mica.fast
from mica.cli import doctor
from mica.fast import patching
from mica.fast.explain import REMEDIES
from tests.support.doctoring import text_under


@pytest.fixture
def versions(monkeypatch):
    """Pretend that these are the installed versions; None: not installed."""

    def pretend(**others):
        def pretended(name):
            if others.get(name, "") is None:
                raise PackageNotFoundError(name)
            return others.get(name) or version(name)

        monkeypatch.setattr(doctor, "version", pretended)
        monkeypatch.setattr(doctor, "packages_distributions", dict)

    return pretend


@pytest.fixture
def uninstalled():
    """Before, and after: what was installed with a changed table must not stay for the tests to come."""
    mica.fast.uninstall()
    yield
    mica.fast.uninstall()


def test_driver_that_torch_warns_of(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("driver too old", stacklevel=1))
    status, report, _ = run()
    assert (status, report["problems"]) == (1, ["torch warns of its GPU: driver too old"])


@pytest.mark.parametrize("package", ["torch", "transformers", "triton"])
def test_version_out_of_range(package, run, versions):
    versions(**{package: "0.1.0"})
    status, report, lines = run()
    assert status == 1
    (row,) = [row for row in report["versions"] if row["problem"]]
    assert report["problems"] == [row["problem"]]
    assert row["problem"].startswith(f"{package} 0.1.0 is not among the supported versions, >=")
    assert text_under(lines, package).startswith(f"0.1.0           {row['problem']}")


def test_peft_out_of_range_that_works_is_not_broken(run, versions):
    """As one between releases can be: all that is patched is there."""
    (supported,) = [need.specifier for need in map(Requirement, requires("mica-fast")) if need.name == "peft"]
    versions(peft="0.19.5")
    status, report, lines = run()
    assert (status, report["problems"]) == (0, [])
    (row,) = [row for row in report["versions"] if row["note"]]
    assert (row["name"], row["version"], row["problem"]) == ("peft", "0.19.5", None)
    assert text_under(lines, "peft") == (
        f"0.19.5          peft 0.19.5 is not among the supported versions, {supported}: not tested, but all "
        "that mica.fast replaces is there"
    )


def test_peft_out_of_range_that_does_not_fit_is_broken(run, versions, uninstalled, monkeypatch):
    changed = patching.PATCHES[0]._replace(parameters="self something_else")
    monkeypatch.setattr(patching, "PATCHES", (changed, *patching.PATCHES[1:]))
    versions(peft="0.1.0")
    status, report, lines = run()
    assert status == 1
    assert report["problems"][0].startswith("peft 0.1.0 is not among the supported versions, >=")
    assert report["problems"][1].startswith("mica.fast leaves this PEFT as it is")
    assert text_under(lines, "peft") == f"0.1.0           {report['problems'][0]}"


def test_prerelease_within_the_range_is_ok(run, versions):
    versions(torch="99.0.0a0+5228986c39")
    assert run()[0] == 0


def test_python_out_of_range(run, monkeypatch):
    monkeypatch.setattr(doctor, "metadata", lambda name: {"Requires-Python": ">=99"})
    status, report, _ = run()
    numbers = ".".join(map(str, sys.version_info[:3]))
    assert status == 1
    assert report["problems"] == [f"Python {numbers} is not among the supported versions, >=99"]


def test_missing_dependency_ends_the_search(run, versions):
    versions(scipy=None)
    status, report, lines = run()
    assert (status, "devices" in report) == (1, False)
    assert report["problems"][0].startswith("scipy is not installed, and MiCA needs >=")
    assert text_under(lines, "scipy").startswith("not installed")


def test_torch_that_cannot_be_imported(run, monkeypatch):
    def missing(name):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", missing)
    status, report, _ = run()
    assert (status, "devices" in report) == (1, False)
    assert report["problems"] == [
        "torch cannot be imported: OSError: libcudart.so.12: cannot open shared object file"
    ]


def test_source_tree_that_is_not_installed(run, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    status, report, lines = run()
    assert (status, len(report["versions"])) == (1, 1)
    assert "mica-fast is not installed, so the versions that it needs are not known" in lines[-1]


def test_missing_triton(run, versions, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delenv("TRITON_INTERPRET")
    versions(triton=None)
    status, report, lines = run()
    assert (status, report["problems"]) == (1, ["triton is not installed, and MiCA needs >=3.5"])
    (cpu,) = report["devices"]
    assert (cpu["path"], cpu["reason"]) == ("reference", "Triton is not installed")
    needs = ["torch>=2.9", 'triton>=3.5; platform_system == "Nowhere"', 'x; extra == "cli"']
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    status, report, lines = run()
    assert (status, len(report["versions"])) == (0, 4)
    assert text_under(lines, "triton") == "not installed   not needed on this system"


def test_triton_that_cannot_be_imported(run, monkeypatch):
    def broken(name):
        if name == "triton":
            raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(doctor, "import_module", broken)
    status, report, _ = run()
    assert (status, report["devices"][0]["path"]) == (1, "reference")
    assert report["problems"] == ["triton cannot be imported: ImportError: libtriton.so: undefined symbol"]


def test_triton_of_another_distribution_counts(run, versions, monkeypatch):
    versions(triton=None, **{"triton-rocm": triton.__version__})
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"triton": ["triton-rocm"]})
    status, report, _ = run()
    (row,) = [row for row in report["versions"] if row["name"] == "triton"]
    assert (status, row["version"], row["problem"]) == (0, triton.__version__, None)


def test_peft_mismatch_is_broken_and_named(run, uninstalled, monkeypatch, recwarn):
    changed = patching.PATCHES[0]._replace(parameters="self something_else")
    gone = patching.PATCHES[1]._replace(name="nothing")
    monkeypatch.setattr(patching, "PATCHES", (changed, gone, *patching.PATCHES[2:]))
    status, report, lines = run()
    assert not patching.is_installed()
    assert not recwarn.list  # the findings say it
    assert (status, report["peft"]["patched"]) == (1, 0)
    first, second = report["peft"]["mismatches"]
    assert first == "peft.tuners.lora.layer:Linear.forward takes (self x *args **kwargs)"
    assert second == "peft.tuners.lora.layer:Embedding.nothing is not there"
    assert lines[-1] == f"broken: mica.fast leaves this PEFT as it is: {first}, {second}"
    assert [line[16:].strip() for line in lines if "mismatch" in line[:16]] == [first, second]


def test_optional_function_of_peft_may_be_missing(run, uninstalled, monkeypatch):
    optional = next(patch for patch in patching.PATCHES if not patch.required)
    rest = tuple(patch for patch in patching.PATCHES if patch is not optional)
    monkeypatch.setattr(patching, "PATCHES", (optional._replace(name="nothing"), *rest))
    status, report, _ = run()
    assert (status, report["peft"]["patched"]) == (0, len(rest))
    assert report["peft"]["mismatches"] == [f"{optional.owner}.nothing is not there (optional)"]


def test_peft_that_mica_fast_cannot_read(run, monkeypatch):
    def unknown():
        raise AttributeError("no LoraLayer")

    monkeypatch.setattr(patching, "install", unknown)
    status, report, _ = run()
    assert (status, report["peft"]["patched"]) == (1, 0)
    assert report["problems"] == ["mica.fast cannot be imported: AttributeError: no LoraLayer"]


def test_frameworks_that_compute_lora_layers_themselves_are_named(run, versions):
    versions(axolotl="0.19.0", unsloth=None, liger_kernel=None)
    status, report, lines = run()
    assert status == 0
    assert report["bypassing"] == [{"name": "axolotl", "version": "0.19.0", "remedy": REMEDIES["axolotl"]}]
    assert text_under(lines, "axolotl") == (
        "0.19.0          can compute adapted layers without MiCA's code (mica.fast.explain counts them); "
        f"against it: {REMEDIES['axolotl']}"
    )
    versions(axolotl=None, unsloth=None, liger_kernel=None)
    _, report, lines = run()
    assert report["bypassing"] == []
    assert "axolotl" not in "".join(lines)
