"""What a run notes of its machine, and the peak bandwidth that its device is compared with."""

import pytest
import torch

from bench.measure import machine
from bench.measure.peaks import PEAKS
from bench.results.throughput import AT_PEAK


def test_bytes_as_time_at_the_peak_bandwidth(monkeypatch):
    """A listed GPU has the vendor's figure, another one what Triton reads from it; a CPU has none."""
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "get_dram_gbps", lambda: 250.0)
    monkeypatch.setattr(machine, "DEVICE", "cuda")
    for name, bandwidth in {"NVIDIA H200": PEAKS["NVIDIA H200"].bandwidth, "unlisted": 250e9}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert machine.seconds_at_peak(bandwidth / 2) == {AT_PEAK: 0.5}
    monkeypatch.setattr(machine, "DEVICE", "cpu")
    assert machine.seconds_at_peak(1.0) == {}


def test_without_git_the_commit_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("MICA_BENCH_COMMIT", "abc")
    assert machine.facts()["commit"] == "abc"
