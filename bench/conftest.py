"""For ``pytest bench`` and parts of it: what holds for all suites.

pytest-benchmark times one test after the other; a machine that slows down in between would favour those that
ran first. Here a test is a cell, whose implementations take turns (`bench.suites.rounds`);
`bench.measure.table` hands its results to pytest-benchmark.
"""

import gc
import os
from contextlib import nullcontext

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's, read at import
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # SciPy's
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MICA_CACHE"] = "0"  # solve, not look up

import torch
from transformers.utils import logging

import mica.fast
from bench.measure.machine import DEVICE
from bench.measure.memory import give_back
from bench.suites.rounds import Once
from mica.cli.adapt.processes import keep_freed_memory

pytest_plugins = ["bench.measure.watching", "bench.measure.table"]
logging.set_verbosity_error()
logging.disable_progress_bar()
mica.fast.enable(lora=True)
keep_freed_memory()  # for all implementations alike: METHOD.md

gc.freeze()  # what is imported by now: a capture collects garbage, and would traverse it each time
STREAM = torch.cuda.Stream() if DEVICE == "cuda" else None


@pytest.fixture(autouse=True)
def one_stream(benchmark):
    """Not the default one, on which nothing can be captured; a backward runs on its forward's stream."""
    with nullcontext() if STREAM is None else torch.cuda.stream(STREAM):
        yield


@pytest.fixture(scope="module", autouse=True)
def released(request):
    """A suite leaves neither models nor a fragmented heap, which would slow down the next one."""
    yield
    Once.graphs.clear()
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    gc.collect()
    give_back()
