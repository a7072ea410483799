"""Shapes, dtypes and operands for the kernels' tests.

They run interpreted on CPU tensors, or compiled on the device that MICA_TEST_DEVICE names.
"""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mica.kernels.common import target_of
from mica.kernels.configs import SHARED_MEMORY
from tests.support.guarding import guarded
from tests.support.oracle import padded
from tests.support.properties import st

DEVICE = os.environ.get("MICA_TEST_DEVICE", "cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# tokens, in_features, out_features, rank: none, ones, odd sizes, more than one tile each way, padded ranks
SHAPES = [
    (0, 8, 8, 2),
    (1, 1, 1, 1),
    (5, 7, 3, 2),
    (33, 150, 65, 16),
    (70, 260, 140, 20),
    (18, 64, 48, 130),
    (20, 256, 128, 5),
]

# dtype of x and y, of the adapter, of the product
DTYPES = [(FP32, FP32, FP32), (BF16, FP32, BF16), (BF16, BF16, BF16), (FP16, FP32, FP16), (BF16, FP32, FP32)]

# dtype of x and the weight, of the adapter, compute_dtype, of a layer. On a device few: each takes five to
# eight variants to compile.
LAYER_DTYPES = [(BF16, FP32, None), (BF16, FP32, FP32)]
if DEVICE == "cpu":
    LAYER_DTYPES += [(FP32, FP32, None), (BF16, BF16, None), (FP16, FP32, None)]

# Whose configurations are run: those of all targets in the interpreter, on a device its own, since another
# target's may ask for more shared memory than there is.
TARGETS = tuple(SHARED_MEMORY) if DEVICE == "cpu" else (target_of(torch.device(DEVICE)),)

draw = SimpleNamespace(
    sizes=st.integers(1, 90),
    ranks=st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 256])),
    dtypes=st.sampled_from(DTYPES),
    layouts=st.sampled_from(["rows", "columns", "contiguous"]),
    probabilities=st.sampled_from([0.0, 0.0, 0.3, 0.9]),
    # of experts: rows of each; rows that belong to none; `tests.support.expert_cases.stack`'s layouts
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=9),
    leftovers=st.integers(0, 3),
    stacks=st.sampled_from(["contiguous", "gaps", "peft"]),
)

mica_and_lora = pytest.mark.parametrize("trains_B", [False, True], ids=["MiCA", "LoRA"])


def operand(rows, columns, dtype, layout="rows", scale=1.0):
    """A random matrix on the tested device, its rows or its columns lying apart in a buffer of NaN."""
    if layout == "contiguous":
        matrix = (torch.randn(rows, columns) * scale).to(dtype)
    elif layout == "columns":
        matrix = padded(columns, rows, dtype=dtype, scale=scale).t()
    else:
        matrix = padded(rows, columns, dtype=dtype, scale=scale)
    return guarded(matrix, DEVICE)


def far_apart(rows, columns, dtype):
    """A random matrix whose rows are 2^30 elements and more apart: offsets pass 2^31 from the third row on.

    The zeros between them are never touched, so a CPU gives them no memory.
    """
    stride = 2**30 + 16
    if DEVICE == "cpu":
        storage = torch.from_numpy(np.zeros(rows * stride, dtype=np.int16))
        storage = storage.view(dtype)
    else:
        storage = torch.zeros(rows * stride, dtype=dtype, device=DEVICE)
    matrix = storage.as_strided((rows, columns), (stride, 1), 8)
    matrix.copy_(torch.randn(rows, columns).to(dtype))
    return matrix


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)
