"""Frozen B as the kernels need it: compute dtype, contiguous, columns padded to 16. Made once, never stale.

A tensor that is already in that form is used directly. Of others a copy is kept as long as the tensor lives
(by a weak reference: a tensor at the address of a deleted one has no entry), and made again when PyTorch
reports that the contents may have changed: another storage (``data_ptr``; the old one is kept alive, so its
address cannot be reused) or an in-place write (``_version``). PyTorch does not count writes through
``tensor.data``: after such an edit of B call `forget`.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from mica.kernels import workspace
from mica.kernels.launching import layout
from mica.kernels.limits import padded_columns


class _Entry(NamedTuple):
    of_B: weakref.ref[Tensor]  # drops the entry when B is freed, before another tensor can have its id
    state: tuple
    source: Tensor  # shares B's storage: what it points to cannot be freed and reused
    factor: Tensor


# By the id of B. torch's weak keys, which compare tensors by identity, take ten times as long.
entries: dict[int, _Entry] = {}


def prepare(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Bᵀ, (padded_columns(rank), out_features), its last rows 0; a view of contiguous rows of B in dtype.

    lora_B is (out_features, rank).
    """
    if lora_B.dtype is dtype and not lora_B.shape[1] % 16 and lora_B.is_contiguous():
        return (lora_B.detach() if lora_B.requires_grad else lora_B).t()
    if not _is_cacheable(lora_B):
        return padded(lora_B, dtype).t()
    key, state = id(lora_B), (lora_B._version, lora_B.data_ptr(), layout(lora_B), dtype)
    entry = entries.get(key)
    if entry is None or entry.state != state:
        of_B = weakref.ref(lora_B, lambda _: entries.pop(key, None))
        factor = workspace.kept(lambda: padded(lora_B, dtype), lora_B).t()
        entry = entries[key] = _Entry(of_B, state, lora_B.detach(), factor)
    return entry.factor


def forget() -> None:
    """Prepare each B again at its next use: after an edit through ``.data``."""
    entries.clear()


def padded(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    columns = padded_columns(lora_B.shape[1])
    if columns == lora_B.shape[1]:
        return lora_B.detach().to(dtype).contiguous()
    prepared = lora_B.new_zeros(lora_B.shape[0], columns, dtype=dtype)
    prepared[:, : lora_B.shape[1]] = lora_B.detach()
    return prepared


def _is_cacheable(lora_B: Tensor) -> bool:
    """Whether a change of this tensor would be noticed.

    Inference tensors have no version. Under a process group FSDP may gather B into the same storage again and
    hides the write from the version. A copy made while a CUDA graph is captured lives in the graph's memory.
    """
    return (
        lora_B.is_leaf
        and not lora_B.is_inference()
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and not (lora_B.is_cuda and torch.cuda.is_current_stream_capturing())
    )
