"""The clocks of an accelerator, on a simulated device: which time is whose?"""

from itertools import count
from types import SimpleNamespace

import pytest

from bench.measure import clocks


class Device:
    """Runs what is enqueued in order; the host's clock advances by what its calls cost."""

    def __init__(self):
        self.host = self.free = 0.0

    def enqueue(self, device_seconds, host_seconds=0.0):
        self.host += host_seconds
        self.free = max(self.free, self.host) + device_seconds

    def synchronize(self):
        self.host = max(self.host, self.free)


@pytest.fixture
def device(monkeypatch):
    simulated = Device()

    class Event:
        def __init__(self, enable_timing):
            self.synchronize = simulated.synchronize

        def record(self):
            self.at = max(simulated.free, simulated.host)

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    cuda = SimpleNamespace(Event=Event, synchronize=simulated.synchronize, is_available=lambda: True)
    cuda._sleep = lambda cycles: simulated.enqueue(cycles / clocks.CLOCK_RATE)
    monkeypatch.setattr(clocks.torch, "cuda", cuda)
    monkeypatch.setattr(clocks, "_empty_cache", lambda: simulated.enqueue(1e-4))
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: simulated.host)
    return simulated


@pytest.mark.parametrize("host", [1e-5, 4e-4, 3e-3])
def test_device_time_is_without_the_hosts(device, host):
    """Three launches of 20 µs each, however long the host takes for them."""

    def call():
        for _ in range(3):
            device.enqueue(2e-5, host / 3)

    assert clocks.device_seconds(call) == pytest.approx(6e-5)


def test_a_call_that_becomes_slow_is_measured_again(device):
    calls = count()

    def call():
        device.enqueue(2e-5, 1e-5 if next(calls) == 0 else 2e-3)
        device.enqueue(2e-5)

    assert clocks.device_seconds(call) == pytest.approx(4e-5)


def test_a_call_that_waits_for_the_device_has_no_device_time(device):
    def call():
        device.enqueue(2e-5)
        device.synchronize()

    with pytest.raises(clocks.HostTooSlowError):
        clocks.device_seconds(call)


def test_a_sample_waits_for_the_device_before_and_after_its_calls(device):
    device.enqueue(5e-3)
    timed = clocks.sample(lambda: device.enqueue(1e-3, 1e-5), 4)
    assert timed.wall == pytest.approx((1e-5 + 4e-3) / 4)


def test_cpu_time_is_without_what_others_do_meanwhile(device, monkeypatch):
    monkeypatch.setattr(clocks.time, "process_time", lambda: 0.25 * device.host)
    timed = clocks.sample(lambda: device.enqueue(0, 1.0), 3)
    assert (timed.cpu, timed.wall) == (0.25, 1.0)
