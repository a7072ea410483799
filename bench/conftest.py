"""For ``pytest bench`` and parts of it: implementations that take turns, and checks before any timing.

pytest-benchmark times one test after the other; a machine that slows down in between would favour those that
ran first. Each test is therefore one round of one implementation, the round number is the outer parameter,
and `bench.results` pairs the rounds. A round is a line in the journal as soon as its test has passed.
"""

import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest

# Two spinning thread pools (PyTorch's OpenMP, SciPy's OpenBLAS) would compete for the cores; read at import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MICA_CACHE"] = "0"  # solve, not look up

import torch
from transformers.utils import logging

from bench.measure.machine import DEVICE
from bench.results import journal
from bench.suites.harness import leave_if_crashed, refuse, sentence, why_refused
from bench.suites.once import Once

pytest_plugins = ["bench.measure.watching", "bench.measure.table"]
logging.set_verbosity_error()
logging.disable_progress_bar()

gc.freeze()  # what is imported by now: a capture collects garbage, and would traverse it each time
STREAM = torch.cuda.Stream() if DEVICE == "cuda" else None


@pytest.fixture
def once(request, benchmark):
    request.node.once = Once(benchmark)
    return request.node.once


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A round counts once its test has passed; an implementation whose test failed has no number."""
    report = yield
    once = getattr(item, "once", None)
    if once is None or call.when != "call":
        return report
    if report.passed:
        for sample in once.samples:
            journal.write("sample", **sample)
    elif report.failed and once.cell is not None:
        refuse(once.cell, sentence(call.excinfo.value), once.implementation)
        leave_if_crashed()
    return report


@pytest.fixture(autouse=True)
def one_stream():
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
    with suppress(OSError, AttributeError):  # glibc's: freed memory goes back to the system
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def gated():
    """``gated(group, check, implementation)``: what ``check()`` returns; fails if either is refused.

    Once ``check()`` has raised, the cell is refused for good; `harness.build_all` refuses single
    implementations.
    """

    def gated(group: str, check: Callable[[], object], implementation: str = "") -> object:
        checked = None
        if why_refused(group, implementation) is None:
            journal.write("doing", group=group)
            try:
                checked = check()
            except Exception as error:
                refuse(group, sentence(error))
                leave_if_crashed()
        why = why_refused(group, implementation)
        if why is not None:
            pytest.fail(f"no number for {group}, {implementation}: {why}", pytrace=False)
        return checked

    return gated
