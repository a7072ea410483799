"""Memory for split sums: their parts, and arrival counters, integers that are 0 between launches.

Also `allocate_persistent`, for memory that outlives a call.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mica.kernels.common import raw_stream

if TYPE_CHECKING:
    from mica.kernels.launching import Plan

# One buffer per (device index, stream): launches on one stream follow each other, and each leaves 0 behind.
# PyTorch's own streams are never destroyed. A stream that reuses the handle of another library's, destroyed
# after its last launch ended, finds zeros too.
_counters: dict[tuple[int, int], Tensor] = {}


def of_split(plan: Plan, tensor: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(parts, counters) for a launch on the device of ``tensor``: one counter for each tile of the output.

    None where the plan splits nothing.
    """
    if not plan.parts:
        return None, None
    parts = tensor.new_empty(plan.parts, dtype=torch.float32)
    num_tiles = plan.grid[0]
    return parts, counters(num_tiles, tensor)


def counters(count: int, tensor: Tensor) -> Tensor:
    """At least ``count`` int32 zeros, written only the first time on a stream, or when it needs more.

    While a CUDA graph is captured they are made inside the graph: two graphs captured on one stream may be
    replayed at the same time.
    """
    if not tensor.is_cuda or torch.cuda.is_current_stream_capturing():
        return tensor.new_zeros(count, dtype=torch.int32)

    key = (tensor.get_device(), stream_of(tensor))
    zeros = _counters.get(key)
    if zeros is None or zeros.numel() < count:
        zeros = allocate_persistent(lambda: tensor.new_zeros(max(count, 4096), dtype=torch.int32), tensor)
        _counters[key] = zeros
    return zeros


def allocate_persistent(make: Callable[[], Tensor], tensor: Tensor) -> Tensor:
    """The result of ``make``, on the device of ``tensor``, in memory that may outlive this call.

    ``torch.compile(mode="reduce-overhead")`` warms up inside the memory pool of its CUDA graphs, without
    capturing, and refuses memory that stays alive there. Such a pool serves one thread's allocations, so
    another thread allocates, on the default stream.
    """
    if not tensor.is_cuda:
        return make()

    caller = torch.cuda.current_stream(tensor.device)
    default = torch.cuda.default_stream(tensor.device)

    def run() -> Tensor:
        with torch.cuda.stream(default):
            return make()

    default.wait_stream(caller)
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(run).result()
    follow(made)
    return made


def follow(made: Tensor) -> None:
    """Let the current stream use what `allocate_persistent` has made on another one."""
    stream = torch.cuda.current_stream(made.device)
    stream.wait_stream(torch.cuda.default_stream(made.device))
    made.record_stream(stream)


def stream_of(tensor: Tensor) -> int:
    """The handle of the current stream of the tensor's device; 0 on a CPU."""
    return raw_stream(tensor.get_device()) if tensor.is_cuda else 0
