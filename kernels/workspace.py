"""Memory of split sums: their parts, and arrival counters, integers that are 0 between launches.

And how memory is had that outlives a call: `kept`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mica.kernels.launching import Plan

# One buffer a (device index, stream): launches on one stream follow each other, and each leaves 0 behind.
# PyTorch's own streams are never destroyed; one that gets the handle of a foreign stream, destroyed after
# its last launch had ended, finds zeros too.
_counters: dict[tuple[int, int], Tensor] = {}

# `torch.cuda.current_stream` makes an object of it, in ten times as long. A build without CUDA has none.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def of_split(plan: Plan, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(parts, counters) for a launch on the device of ``tensor``; a counter for each column of the grid.

    Where another launch adds the parts nobody counts: the counters' place is taken by the parts.
    """
    parts = tensor.new_empty(plan.parts, dtype=torch.float32)
    return parts, counters(plan.grid[0], tensor) if plan.then is None else parts


def counters(count: int, tensor: Tensor) -> Tensor:
    """At least ``count`` zeros, int32. A fill kernel only the first time a stream asks, or asks for more.

    While a CUDA graph is captured they are made anew inside the graph: two graphs captured on one stream may
    be replayed at the same time.
    """
    if not tensor.is_cuda or torch.cuda.is_current_stream_capturing():
        return tensor.new_zeros(count, dtype=torch.int32)
    index = tensor.get_device()
    key = (index, _raw_stream(index))
    found = _counters.get(key)
    if found is None or found.numel() < count:
        found = kept(lambda: tensor.new_zeros(max(count, 4096), dtype=torch.int32), tensor)
        _counters[key] = found
    return found


def kept(make: Callable[[], Tensor], tensor: Tensor) -> Tensor:
    """What ``make`` gives, on the device of ``tensor``, in memory that may outlive this call.

    ``torch.compile(mode="reduce-overhead")`` warms up inside the memory pool of its CUDA graphs, without
    capturing, and refuses what is left alive there. Such a pool takes what one thread allocates: so this is
    done by another one, on the default stream.
    """
    if not tensor.is_cuda:
        return make()
    caller, own = torch.cuda.current_stream(tensor.device), torch.cuda.default_stream(tensor.device)

    def run() -> Tensor:
        with torch.cuda.stream(own):
            return make()

    own.wait_stream(caller)
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(run).result()
    caller.wait_stream(own)
    made.record_stream(caller)
    return made
