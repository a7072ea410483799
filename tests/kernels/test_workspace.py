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
    """A CPU plays the GPU: what is asked of the driver is put in its place."""
    made, capturing, stream = [], False, 7
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(workspace, "_raw_stream", lambda index: stream + index)
    monkeypatch.setattr(workspace, "_counters", {})
    tensor = OnGpu(made)
    first = workspace.counters(5, tensor)
    assert workspace.counters(9, tensor) is first
    assert workspace.counters(5000, tensor).shape == (5000,)
    assert made == [4096, 5000]
    capturing = True  # a graph gets its own: it may be replayed beside another
    assert workspace.counters(5, tensor).shape == (5,)
    assert made == [4096, 5000, 5]
    capturing, stream = False, 2
    workspace.counters(5, tensor)
    assert made[-1] == 4096
