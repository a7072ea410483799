import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mica.kernels import workspace


def test_zeros_for_the_cpu_are_new_each_time():
    first = workspace.counters(5, torch.empty(1))
    assert (first.dtype, first.shape) == (torch.int32, (5,))
    assert not first.any()
    assert workspace.counters(5, torch.empty(1)).data_ptr() != first.data_ptr()


def on_gpu(made=None):
    """What is asked of a tensor on a GPU; ``made`` gets the sizes of what is allocated."""

    def new_zeros(count, dtype):
        made.append(count)
        return torch.zeros(count, dtype=dtype)

    return SimpleNamespace(is_cuda=True, device=None, get_device=lambda: 1, new_zeros=new_zeros)


def test_one_buffer_a_stream_that_grows(monkeypatch):
    """A CPU plays the GPU: the driver's answers are replaced."""
    made, persistent, capturing, stream = [], [], False, 7
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(workspace, "raw_stream", lambda index: stream + index)
    monkeypatch.setattr(workspace, "_counters", {})
    monkeypatch.setattr(workspace, "allocate_persistent", lambda make, tensor: persistent.append(1) or make())
    tensor = on_gpu(made)
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
    assert len(persistent) == 3  # all but the graph's


@pytest.fixture
def log(monkeypatch):
    """What happens on a GPU that a CPU plays, in order."""
    happened, current = [], threading.local()

    def stream(name):
        return SimpleNamespace(
            name=name, wait_stream=lambda other: happened.append(f"{name} waits for {other.name}")
        )

    @contextmanager
    def entered(stream):
        current.name = stream.name
        yield

    caller, default = stream("the caller's"), stream("the default")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    return happened, current


def test_what_is_kept_is_made_by_another_thread_on_the_default_stream(log):
    """A pool of CUDA graphs takes what this thread allocates; the streams wait for each other."""
    happened, current = log
    threads = []

    def make():
        threads.append(threading.get_ident())
        happened.append(f"made on {current.name}")

        def record_stream(stream):
            happened.append(f"recorded on {stream.name}")

        return SimpleNamespace(device="cuda", record_stream=record_stream)

    workspace.allocate_persistent(make, on_gpu())
    assert threads != [threading.get_ident()]
    assert happened == [
        "the default waits for the caller's",
        "made on the default",
        "the caller's waits for the default",
        "recorded on the caller's",
    ]


def test_an_error_of_the_other_thread_is_raised_here(log):
    with pytest.raises(ZeroDivisionError):
        workspace.allocate_persistent(lambda: 1 / 0, on_gpu())
