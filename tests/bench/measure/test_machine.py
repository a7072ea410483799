"""What is known of a device."""

import pytest
import torch

from bench.measure import machine
from bench.measure.peaks import PEAKS
from bench.results.throughput import AT_PEAK


def test_bytes_as_time_at_the_peak_bandwidth(monkeypatch):
    name = "NVIDIA H200"
    monkeypatch.setattr(machine, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert machine.seconds_at_peak(PEAKS[name].bandwidth / 2) == {AT_PEAK: 0.5}
    monkeypatch.setattr(machine, "DEVICE", "cpu")
    assert machine.seconds_at_peak(1.0) == {}


def test_a_device_that_is_not_listed_tells_its_own_bandwidth(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "get_dram_gbps", lambda: 250.0)
    monkeypatch.setattr(machine, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert machine.seconds_at_peak(500e9) == {AT_PEAK: 2.0}
