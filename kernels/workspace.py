"""Arrival counters for the ordered reductions: integers that are 0 between launches."""

from __future__ import annotations

import torch
from torch import Tensor

# One buffer a (device, stream): launches on one stream follow each other, and each leaves 0 behind.
# PyTorch's own streams are never destroyed; one that gets the handle of a foreign stream, destroyed after
# its last launch had ended, finds zeros too.
_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """(count) zeros, int32. A fill kernel only the first time a stream asks, or asks for more.

    While a CUDA graph is captured they are made anew inside the graph: two graphs captured on one stream may
    be replayed at the same time.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    found = _counters.get(key)
    if found is None or found.numel() < count:
        found = _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return found[:count]
