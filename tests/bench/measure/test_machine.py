"""What is known of a device."""

import pytest
import torch

from bench.measure import machine
from bench.measure.peaks import PEAKS
from bench.results.throughput import AT_PEAK


def test_bytes_as_time_at_the_peak_bandwidth(monkeypatch):
    """A device that is not listed tells its own."""
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "get_dram_gbps", lambda: 250.0)
    monkeypatch.setattr(machine, "DEVICE", "cuda")
    for name, bandwidth in {"NVIDIA H200": PEAKS["NVIDIA H200"].bandwidth, "a card": 250e9}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert machine.seconds_at_peak(bandwidth / 2) == {AT_PEAK: 0.5}
    monkeypatch.setattr(machine, "DEVICE", "cpu")
    assert machine.seconds_at_peak(1.0) == {}
