"""Memory that the merges of a thread use again, chunk by chunk, in place of new temporaries.

On a CPU new memory is mapped page by page when it is first written to: a temporary of 1 MB takes 3.5 ns an
element, and a pass over one that is in the cache 0.2.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Elements of a weight that are worked on at a time. On a CPU the fp32 temporaries of 1 MB should stay in the
# cache: 40 layers of 1536 x 576 merge in 0.12 s, but in 0.42 s with 2**20. On a device the number of launches
# matters; 2**24 are 64 MB. Products of other numbers of rows may differ in their last bits: with another
# chunk a merged weight has other bits.
CHUNK = 2**18
DEVICE_CHUNK = 2**24

# The most that is held for a name and a dtype: a chunk of fp64. A merge into bf16 holds 5 MB in six.
_MOST_BYTES = 2**21


class _Held(threading.local):
    """Every thread has its own, which goes when it ends."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}  # flat


_held = _Held()


def rows_at_a_time(weight: Tensor) -> int:
    size = DEVICE_CHUNK
    if weight.device.type == "cpu":
        size = CHUNK
    return max(1, size // max(1, weight.shape[1]))


def scratch(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; on a CPU it is valid until the next one of this name in this thread."""
    size = shape.numel()
    if device.type != "cpu" or size * dtype.itemsize > _MOST_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = _held.memory.get((name, dtype))
    if memory is None or len(memory) < size:
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            memory = torch.empty(size, dtype=dtype, device="cpu")
        _held.memory[name, dtype] = memory
    return memory[:size].view(shape)


def scratch_like(tensor: Tensor, name: str) -> Tensor:
    """`scratch` of this name with the shape and the dtype of a tensor, contiguous."""
    return scratch(name, tensor.shape, tensor.dtype, tensor.device)


def convert(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor itself where it has this dtype, else a copy in `scratch` of this name."""
    if tensor.dtype == dtype:
        return tensor
    return scratch(name, tensor.shape, dtype, tensor.device).copy_(tensor)
