"""For tests of kernels, which on a device run in many processes."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.support.kernel_cases import DEVICE

LARGEST = 20e9  # bytes that the operands of a test of ``large_memory`` take at most


@pytest.fixture
def large_memory():
    """Of a GPU, for one test at a time: its operands take 13 to 19 GB, which are freed afterwards.

    On a CPU nobody touches what lies between their rows, so that they take no memory.
    """
    if DEVICE == "cpu":
        yield
        return
    with FileLock(Path(tempfile.gettempdir()) / "mica-tests-large-memory.lock"):
        free, _ = torch.cuda.mem_get_info()
        if free < LARGEST:
            pytest.skip(
                f"needs {LARGEST / 1e9:.0f} GB of the GPU's memory, of which {free / 1e9:.0f} are free"
            )
        yield
        gc.collect()
        torch.cuda.empty_cache()
