"""Frozen B as the kernels want it: compute dtype, contiguous, columns padded to 16. Made once, never stale.

A tensor that is already so is used as it is. Of others a copy is kept as long as the tensor itself lives (it
is the key, by a weak reference: a tensor that lies where a deleted one lay has no entry), and made again
when PyTorch says that the contents may have changed: another storage (``data_ptr``; the old one is kept
alive, so its address cannot come back) or an in-place write (``_version``). One write PyTorch does not
count: through ``tensor.data``. Whoever edits B so calls `forget`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mica.kernels.common import padded_columns


class _Entry(NamedTuple):
    state: tuple
    source: Tensor  # shares B's storage: what it points to cannot be freed and reused
    prepared: Tensor


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepare(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """(out_features, padded_columns(rank)) in dtype, contiguous, its last columns 0; lora_B is (…, rank)."""
    columns = padded_columns(lora_B.shape[1])
    if lora_B.dtype == dtype and lora_B.shape[1] == columns and lora_B.is_contiguous():
        return lora_B.detach()
    if not _is_cacheable(lora_B):
        return _padded(lora_B, dtype, columns)
    state = (lora_B._version, lora_B.data_ptr(), lora_B.shape, lora_B.stride(), lora_B.device, dtype)
    entry = _entries.get(lora_B)
    if entry is None or entry.state != state:
        entry = _entries[lora_B] = _Entry(state, lora_B.detach(), _padded(lora_B, dtype, columns))
    return entry.prepared


def forget() -> None:
    """Prepare every B again at its next use: after an edit through ``.data``."""
    _entries.clear()


def _padded(lora_B: Tensor, dtype: torch.dtype, columns: int) -> Tensor:
    if columns == lora_B.shape[1]:
        return lora_B.detach().to(dtype).contiguous()
    prepared = lora_B.new_zeros(lora_B.shape[0], columns, dtype=dtype)
    prepared[:, : lora_B.shape[1]] = lora_B.detach()
    return prepared


def _is_cacheable(lora_B: Tensor) -> bool:
    """Whether a change of this tensor would be seen.

    Inference tensors have no version. Under a process group FSDP may gather B into the same storage again,
    and hides the write from the version. A copy made in a CUDA graph's capture lives in the graph's memory.
    """
    return (
        lora_B.is_leaf
        and not lora_B.is_inference()
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and not (lora_B.is_cuda and torch.cuda.is_current_stream_capturing())
    )
