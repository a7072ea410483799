import importlib.util

import pytest
import torch

from mica.kernels import runtime


def test_cpu_and_meta_have_no_kernels():
    assert runtime.why_unavailable(torch.device("cpu")) == "no Triton kernels for devices of type 'cpu'"
    assert "meta" in runtime.why_unavailable(torch.device("meta"))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert runtime.triton_version() is None
    assert runtime.why_unavailable(torch.device("cuda")) == "Triton is not installed"


@pytest.mark.parametrize(
    ("capability", "hip", "usable"), [((7, 5), None, False), ((9, 0), None, True), ((9, 4), "6.4", True)]
)
def test_devices(monkeypatch, capability, hip, usable):
    """No GPU is asked for: the answers of one are put in its place."""
    monkeypatch.setattr(runtime, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    reason = runtime.why_unavailable(torch.device("cuda"))
    assert reason == (None if usable else "a card is older than compute capability 8.0")
