import copy
import importlib.util
import os
from contextlib import nullcontext

import pytest
import torch

from mica.kernels import down_projection, runtime
from tests.support.kernel_cases import DEVICE


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(runtime, "tried", {})
    triton_version = runtime.triton_version
    triton_version.cache_clear()
    yield
    triton_version.cache_clear()


def test_cpu_and_meta_have_no_kernels_but_interpreted_ones(monkeypatch):
    assert runtime.why_unavailable(torch.device("cpu")) == runtime.ON_A_CPU
    assert "meta" in runtime.why_unavailable(torch.device("meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runtime.why_unavailable(torch.device("cpu")) is None


@pytest.mark.parametrize(("value", "interprets"), [("true", True), ("on", True), ("0", False), ("", False)])
def test_tritons_words_for_yes(monkeypatch, value, interprets):
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert runtime.is_interpreting() == interprets == bool(triton.knobs.runtime.interpret)


def test_triton_of_another_distribution(monkeypatch):
    """As in PyTorch's wheels for ROCm."""

    def version(name):
        if name == "triton":
            raise runtime.PackageNotFoundError(name)
        return f"3.5 from {name}"

    monkeypatch.setattr(runtime, "version", version)
    monkeypatch.setattr(runtime, "packages_distributions", lambda: {"triton": ["pytorch-triton-rocm"]})
    assert runtime.triton_version() == "3.5 from pytorch-triton-rocm"
    runtime.triton_version.cache_clear()
    monkeypatch.setattr(runtime, "packages_distributions", dict)
    assert runtime.triton_version() == "unknown"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert runtime.triton_version() is None
    assert runtime.why_unavailable(torch.device("cuda")) == "Triton is not installed"


@pytest.fixture
def a_gpu(monkeypatch):
    """Needs no GPU: the driver's answers are replaced."""
    monkeypatch.setattr(runtime, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(runtime, "trial", lambda device: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((7, 5), None, "a card is older than compute capability 8.0"),
        ((9, 0), None, None),
        ((9, 4), "6.4", "no Triton kernels for ROCm"),
    ],
)
def test_devices(a_gpu, capability, hip, expected):
    a_gpu.setattr(torch.version, "hip", hip)
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.why_unavailable(torch.device("cuda")) == expected
    assert runtime.is_settled(torch.device("cuda"))


def test_a_trial_kernel_that_fails_is_a_reason_and_is_run_once(a_gpu):
    calls = []

    def trial(device):
        calls.append(device)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    a_gpu.setattr(runtime, "trial", trial)
    for _ in range(2):
        reason = runtime.why_unavailable(torch.device("cuda"))
        assert reason == "a trial kernel failed on it: RuntimeError: Failed to find C compiler."
    assert len(calls) == 1


@pytest.mark.parametrize("verdict", ["wrong", None])
def test_nothing_is_tried_while_a_graph_is_captured(a_gpu, verdict):
    """A device that was not tried before runs no kernels then; a capture keeps to what was found before."""
    gpu = torch.device("cuda")
    a_gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    a_gpu.setattr(runtime, "trial", lambda device: verdict)
    assert "no kernel was tried on it before the capture" in runtime.why_unavailable(gpu)
    assert not runtime.is_settled(gpu)
    for capturing in (False, True):
        a_gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert runtime.why_unavailable(gpu) == verdict
        assert runtime.is_settled(gpu)


def test_where_nothing_is_tried_all_is_settled(a_gpu):
    assert runtime.is_settled(torch.device("cpu"))
    assert not runtime.is_settled(torch.device("cuda"))
    a_gpu.setenv("TRITON_INTERPRET", "1")
    assert runtime.is_settled(torch.device("cuda"))
    a_gpu.delenv("TRITON_INTERPRET")
    a_gpu.setattr(runtime, "triton_version", lambda: None)
    assert runtime.is_settled(torch.device("cuda"))


def test_a_raw_variable_follows_the_environment(monkeypatch):
    """And another one: `datasets` puts a copy in place of os.environ after a map by several processes."""
    value = runtime.raw_variable("MICA_A_VARIABLE")
    assert value() is None
    monkeypatch.setenv("MICA_A_VARIABLE", "1")
    first = value()
    monkeypatch.setenv("MICA_A_VARIABLE", "2")
    assert value() not in (None, first)
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    monkeypatch.setenv("MICA_A_VARIABLE", "1")
    assert value() == os.environ.encodevalue("1")
    monkeypatch.setattr(os, "environ", {"MICA_A_VARIABLE": "3"})  # another object than Python's own
    assert runtime.raw_variable("MICA_A_VARIABLE")() == "3"


@pytest.mark.parametrize("wrong", [False, True])
def test_the_trial_compares_a_result(monkeypatch, wrong):
    """Its numbers are exact in bf16 or rounded once, so one wrong bit is seen."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    if wrong:
        right = down_projection.down_projection

        def off_by_one_bit(x, factor):
            h = right(x, factor)
            h.view(torch.int16)[3, 5] ^= 1
            return h

        monkeypatch.setattr(down_projection, "down_projection", off_by_one_bit)
    assert runtime.trial(torch.device(DEVICE)) == (
        "a trial kernel gave a wrong result on it" if wrong else None
    )
