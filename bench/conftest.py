"""Shared by the suites: rivals that take turns, and checks before any time.

pytest-benchmark times one test after the other; a machine that slows down in between would favour whoever
ran first. Each test is therefore one round of one rival, the round number is the outer parameter, and
`bench.results` pairs the rounds.
"""

import ctypes
import gc
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from bench.harness import DEVICE, SIZE, finished, instructions, limit

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MICA_CACHE"] = "0"  # solved, not found

from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

_refused: dict[str, str] = {}


def pytest_benchmark_update_machine_info(config, machine_info):
    for library in ("torch", "peft", "transformers", "triton", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            machine_info[library] = version(library)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    machine_info["bf16 instructions"] = instructions()
    machine_info["instructions limited to"] = limit()
    machine_info["size"] = SIZE
    machine_info["node"] = platform.machine()  # no host names in committed results


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """A cell that was refused at any time has no number in the result, whatever was timed before."""
    kept = [entry for entry in output_json["benchmarks"] if entry["group"] not in _refused]
    output_json["benchmarks"] = kept


def pytest_sessionfinish():
    """Apart from pytest-benchmark's file, which there is not if nothing was timed."""
    file = os.environ.get("MICA_BENCH_REFUSED")
    if file and _refused:
        refused = [{"group": name, "why": why} for name, why in _refused.items()]
        Path(file).write_text(json.dumps(refused))


class Once:
    """Times one sample: a round of one rival, the mean of ``iterations`` calls.

    ``warm_up``: one call before, for caches and for memory that the rival before has given back.
    ``axes``: what work it is; ``facts``: what was counted or measured beside the time.
    """

    def __init__(self, benchmark):
        self.benchmark = benchmark

    def __call__(self, function, group, rival, axes, iterations=1, warm_up=False, **facts):
        self.benchmark.group = group
        self.note(rival=rival, axes=axes, **facts)
        call = finished(function)
        if warm_up:
            call()
        return self.benchmark.pedantic(call, rounds=1, iterations=iterations)

    def note(self, **facts):
        self.benchmark.extra_info.update(facts)


@pytest.fixture
def once(benchmark):
    return Once(benchmark)


@pytest.fixture(scope="module", autouse=True)
def released(request):
    """A suite leaves neither its models nor a fragmented heap to the next one, whose steps would pay."""
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's: freed memory goes back to the system
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def gated():
    """``gated(group, check)``: what ``check()`` returns; once it has raised, the cell is refused for good."""

    def gated(group: str, check: Callable[[], object]) -> object:
        if group not in _refused:
            try:
                return check()
            except AssertionError as error:
                _refused[group] = str(error).splitlines()[0]
        pytest.fail(f"no number for {group}: {_refused[group]}", pytrace=False)

    return gated
