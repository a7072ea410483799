"""For tests of a device: kernels or an error, and a stream on which work can be captured.

They run on what there is: interpreted kernels on a CPU, and a GPU in a stage of ``python -m bench.gpu``.
"""

from contextlib import nullcontext

import pytest
import torch

from bench.measure.machine import DEVICE
from bench.suites.harness import leave_if_crashed
from mica.paths import choose


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "triton")
    choose.clear()
    yield
    leave_if_crashed()
    choose.clear()


@pytest.fixture(autouse=True)
def one_stream():
    """Not the default one, on which nothing can be captured; a backward runs on its forward's stream."""
    with torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else nullcontext():
        yield
