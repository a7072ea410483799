import torch

from mica.kernels import workspace


def test_zeros_for_the_cpu_are_new_each_time():
    first = workspace.counters(5, torch.device("cpu"))
    assert first.dtype == torch.int32
    assert first.shape == (5,)
    assert not first.any()
    assert workspace.counters(5, torch.device("cpu")).data_ptr() != first.data_ptr()


class Stream:
    cuda_stream = 1


def test_one_buffer_a_stream_that_grows(monkeypatch):
    """A CPU plays the GPU: what is asked of the driver is put in its place."""
    made = []
    zeros = torch.zeros

    def on_cpu(count, dtype, device):
        made.append(count)
        return zeros(count, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", on_cpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(workspace, "_counters", {})
    device, capturing = torch.device("cuda"), False
    first = workspace.counters(5, device)
    assert workspace.counters(9, device).data_ptr() == first.data_ptr()
    assert workspace.counters(5000, device).shape == (5000,)
    assert made == [4096, 5000]
    capturing = True  # a graph gets its own: it may be replayed beside another
    assert workspace.counters(5, device).shape == (5,)
    assert made == [4096, 5000, 5]
    capturing = False
    monkeypatch.setattr(Stream, "cuda_stream", 2)
    workspace.counters(5, device)
    assert made[-1] == 4096
