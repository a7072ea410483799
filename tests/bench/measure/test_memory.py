import torch

from bench.measure.memory import alive_bytes


def test_alive_bytes_are_what_a_graph_keeps():
    x = torch.zeros(1000, 250, requires_grad=True)
    assert alive_bytes(lambda: x.exp()) == 1_000_000  # the result, which the graph keeps too
    assert alive_bytes(lambda: x.exp().sin().sum()) == 1_000_000 + 4
    assert alive_bytes(lambda: x.exp().sin().relu().sum()) == 2_000_000 + 4
    with torch.no_grad():
        assert alive_bytes(lambda: x.exp().sin().sum()) == 4
