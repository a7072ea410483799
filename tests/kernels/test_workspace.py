import threading
from contextlib import contextmanager

import pytest
import torch

from mica.kernels import workspace


def test_zeros_for_the_cpu_are_new_each_time():
    first = workspace.counters(5, torch.empty(1))
    assert first.dtype == torch.int32
    assert first.shape == (5,)
    assert not first.any()
    assert workspace.counters(5, torch.empty(1)).data_ptr() != first.data_ptr()


class OnGpu:
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True

    def __init__(self, made):
        self.made = made

    def get_device(self):
        return 1

    def new_zeros(self, count, dtype):
        self.made.append(count)
        return torch.zeros(count, dtype=dtype)


def test_one_buffer_a_stream_that_grows(monkeypatch):
    """A CPU plays the GPU: the driver's answers are replaced."""
    made, capturing, stream = [], False, 7
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(workspace, "raw_stream", lambda index: stream + index)
    monkeypatch.setattr(workspace, "_counters", {})
    monkeypatch.setattr(workspace, "allocate_persistent", lambda make, tensor: make())
    tensor = OnGpu(made)
    first = workspace.counters(5, tensor)
    assert workspace.counters(9, tensor) is first
    assert workspace.counters(5000, tensor).shape == (5000,)
    assert made == [4096, 5000]
    capturing = True  # a graph gets its own: it may be replayed at the same time as another
    assert workspace.counters(5, tensor).shape == (5,)
    assert made == [4096, 5000, 5]
    capturing, stream = False, 2
    workspace.counters(5, tensor)
    assert made[-1] == 4096


class Stream:
    """A stream that notes what waits for it, and whose it is in each thread."""

    current = threading.local()

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch):
    """What happens on a GPU that a CPU plays, in order."""
    happened = []
    caller, default = Stream("the caller's", happened), Stream("the default", happened)

    @contextmanager
    def stream(entered):
        Stream.current.name = entered.name
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return happened


class Made:
    def __init__(self, log):
        self.log = log

    def record_stream(self, stream):
        self.log.append(f"recorded on {stream.name}")


def test_what_is_kept_is_made_by_another_thread_on_the_default_stream(log):
    """A pool of CUDA graphs takes what this thread allocates; the streams wait for each other."""
    threads = []

    def make():
        threads.append(threading.get_ident())
        log.append(f"made on {Stream.current.name}")
        return Made(log)

    gpu = OnGpu([])
    gpu.device = None
    assert isinstance(workspace.allocate_persistent(make, gpu), Made)
    assert threads != [threading.get_ident()]
    assert log == [
        "the default waits for the caller's",
        "made on the default",
        "the caller's waits for the default",
        "recorded on the caller's",
    ]


def test_an_error_of_the_other_thread_is_raised_here(log):
    def make():
        raise MemoryError("none left")

    gpu = OnGpu([])
    gpu.device = None
    with pytest.raises(MemoryError, match="none left"):
        workspace.allocate_persistent(make, gpu)


def test_counters_are_kept_and_those_of_a_capture_are_not(monkeypatch):
    kept = []
    monkeypatch.setattr(workspace, "raw_stream", lambda index: 7)
    monkeypatch.setattr(workspace, "_counters", {})
    monkeypatch.setattr(workspace, "allocate_persistent", lambda make, tensor: kept.append(1) or make())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    workspace.counters(5, OnGpu([]))
    assert not kept
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    workspace.counters(5, OnGpu([]))
    assert kept == [1]
