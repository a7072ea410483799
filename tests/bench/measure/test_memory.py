import gc
from pathlib import Path

import pytest
import torch

from bench.measure.memory import alive_bytes


def resident_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) * 1024


def test_alive_bytes_are_what_a_graph_keeps():
    x = torch.zeros(1000, 250, requires_grad=True)
    assert alive_bytes(lambda: x.exp()) == 1_000_000  # the result, which the graph keeps too
    assert alive_bytes(lambda: x.exp().sin().sum()) == 1_000_000 + 4
    assert alive_bytes(lambda: x.exp().sin().relu().sum()) == 2_000_000 + 4
    with torch.no_grad():
        assert alive_bytes(lambda: x.exp().sin().sum()) == 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's memory")
def test_alive_bytes_are_those_of_the_process():
    x = torch.zeros(10_000, 1000, requires_grad=True)  # too large to be served from what was freed before

    def forward():
        y = x
        for _ in range(4):
            y = y.exp().sin().relu()
        return y

    counted = alive_bytes(forward)
    gc.collect()
    before = resident_bytes()
    y = forward()
    grown = resident_bytes() - before
    del y
    assert abs(grown / counted - 1) <= 0.1
