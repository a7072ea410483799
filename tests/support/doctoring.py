"""``mica doctor`` on this machine or a faked one: the fixtures of its tests, for `pytest_plugins`."""

import json
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl

from mica.cli import main
from mica.kernels import common, runtime
from mica.paths.products import Slowdown

RATIOS = {torch.bfloat16: Slowdown(0.5, 0.44), torch.float16: Slowdown(1.27, 160.4)}
WORKS = "everything that this machine can do works"


@pytest.fixture
def machine(monkeypatch):
    """A machine without a GPU, whose caches are the test's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("mica.paths.products.slowdown", RATIOS.get)
    monkeypatch.setattr("mica.paths.products.has_native", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(runtime, "tried", {})
    found_once = (common.target_of, runtime.triton_version)
    for function in found_once:
        function.cache_clear()
    yield
    for function in found_once:
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU of this compute capability (or ROCm architecture) and verdict."""

    def pretend(capability=(9, 0), why=None, rocm=None):
        properties = SimpleNamespace(name="Some GPU", total_memory=80 << 30, gcnArchName=rocm)
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(common, "INTERPRETED", tl.constexpr(False))
        monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
        for name, value in (
            ("is_available", True),
            ("device_count", 1),
            ("get_device_capability", capability),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        no_kernels = "no Triton kernels for devices of type 'cpu'"
        monkeypatch.setattr(
            runtime, "why_unavailable", lambda device: why if device.type == "cuda" else no_kernels
        )

    return pretend


@pytest.fixture
def run(machine, tmp_path, capsys):
    """Run the command; returns (status, JSON, lines)."""

    def run():
        file = tmp_path / "doctor.json"
        status = main(["doctor", "--json", str(file)])
        captured = capsys.readouterr()
        assert captured.err == ""
        lines = captured.out.splitlines()
        report = json.loads(file.read_text(encoding="utf-8"))
        assert (status, lines[-1] == WORKS) == ((1, False) if report["problems"] else (0, True))
        if status:
            assert lines[-1] == "broken: " + "; ".join(report["problems"])
        return status, report, lines

    return run


def text_under(lines, label) -> str:
    """What the text says under a label that it has once."""
    (text,) = [line[16:].strip() for line in lines if line[:16].strip() == label]
    return text
