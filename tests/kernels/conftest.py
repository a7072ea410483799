"""Kernel tests run interpreted on CPU tensors, or compiled on the device that MICA_TEST_DEVICE names."""

import pytest
import torch


@pytest.fixture
def matmul_precision():
    """torch's function that sets how fp32 products are made; the old setting comes back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)
