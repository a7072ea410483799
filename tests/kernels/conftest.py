"""Kernel tests run interpreted on CPU tensors, or compiled on the device that MICA_TEST_DEVICE names."""

import os

import pytest
import torch
from hypothesis import settings

# No deadline: the first example compiles or warms up. Derandomised: a red run is red again.
settings.register_profile("kernels", deadline=None, derandomize=True, max_examples=20, database=None)
settings.load_profile("kernels")


@pytest.fixture
def device():
    return torch.device(os.environ.get("MICA_TEST_DEVICE", "cpu"))
