"""Shared by the suites: the real model, and rivals that take turns.

pytest-benchmark times one test after the other; a machine that slows down in between would favour whoever
ran first. Each test is therefore one round of one rival, the round number is the outer parameter, and
`bench.report` takes medians over the rounds.
"""

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MICA_CACHE"] = "0"  # solved, not found

from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_benchmark_update_machine_info(config, machine_info):
    for library in ("torch", "peft", "transformers", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            machine_info[library] = version(library)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["node"] = platform.machine()  # no host names in committed results


@pytest.fixture
def once(benchmark):
    """Time one call: a round of one rival."""

    def once(function, group, rival, **extra):
        benchmark.group = group
        benchmark.extra_info.update(rival=rival, **extra)
        return benchmark.pedantic(function, rounds=1, iterations=1, warmup_rounds=0)

    return once
