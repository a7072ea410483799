"""Frozen B as the kernels need it: compute dtype, contiguous, columns padded to 16. Made once, never stale.

A tensor that is already in that form is used directly. For any other, a copy is kept as long as the tensor
lives (by a weak reference: a tensor at the address of a deleted one has no entry). It is made again when
PyTorch reports that the contents may have changed: another storage (``data_ptr``; the old one is kept alive,
so that its address cannot be reused) or an in-place write (``_version``). PyTorch does not count writes
through ``tensor.data``: after such an edit of B, call `clear` or `mica.fast.clear_caches`. Comparing the
contents would cost a launch per call, and the host would have to wait for its answer.

No copy is kept of a B that may be trained: fused optimizers (``AdamW(fused=True)``, those of bitsandbytes)
write without counting, too.

The B that a backward is given is an alias of the forward's, and the B of a stack of experts is a view, made
again for every call, of the parameter that PEFT stores. The copy belongs to that parameter, whose version a
view shares.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from mica.kernels import limits, workspace
from mica.kernels.launching import layout
from mica.kernels.limits import padded_columns


class _Entry(NamedTuple):
    owner: weakref.ref[Tensor]  # drops the entry when the owner is freed, before another tensor has its id
    state: tuple
    source: Tensor  # shares B's storage, which therefore cannot be freed and reused
    factor: Tensor
    streams: set[int]  # those that have waited for the copy, and may read it


# By the id of the owner: B, or the parameter that it is a view of. torch's weak keys, which compare tensors
# by identity, take ten times as long.
entries: dict[int, _Entry] = {}


def prepare(lora_B: Tensor, dtype: torch.dtype, is_frozen: bool = True) -> Tensor:
    """Bᵀ in ``dtype``, its rows padded with zeros.

    Args:
        lora_B: (out_features, rank), any dtype and strides.
        dtype: of the product.
        is_frozen: False where B may be trained, now or later.

    Returns:
        (padded_columns(rank), out_features), a transposed view of contiguous memory.
    """
    if lora_B.dtype is dtype and not lora_B.shape[1] % 16 and lora_B.is_contiguous():
        frozen = lora_B.detach() if lora_B.requires_grad else lora_B
        return frozen.t()
    base = lora_B._base
    is_alias = base is not None and base.shape == lora_B.shape  # as `mica.ops.operator.save` makes it
    owner = base if is_alias else lora_B
    return _cached(lora_B, owner, dtype, is_frozen)


def prepare_experts(lora_B: Tensor, dtype: torch.dtype, is_frozen: bool = True) -> Tensor:
    """Bᵀ of each expert, as `prepare` gives it.

    Args:
        lora_B: (num_experts, out_features, rank), any dtype and strides. A view whose base PyTorch does not
            know, such as the result of ``detach()``, has a copy of its own for as long as it lives.
        dtype, is_frozen: as `prepare`.

    Returns:
        (num_experts, padded_columns(rank), out_features).
    """
    if lora_B.dtype is dtype and not lora_B.shape[2] % 16 and lora_B.is_contiguous():
        return lora_B.detach().transpose(1, 2)
    owner = lora_B if lora_B._base is None else lora_B._base
    return _cached(lora_B, owner, dtype, is_frozen)


def _cached(lora_B: Tensor, owner: Tensor, dtype: torch.dtype, is_frozen: bool) -> Tensor:
    """`padded` with the last two dimensions transposed, kept as long as ``owner`` lives."""
    if not is_frozen or not _is_cacheable(lora_B, owner):
        return padded(lora_B, dtype).transpose(-1, -2)

    key = id(owner)
    state = (lora_B._version, lora_B.data_ptr(), layout(lora_B), dtype)
    stream = workspace.stream_of(lora_B)
    entry = entries.get(key)
    if entry is None or entry.state != state:
        factor = workspace.allocate_persistent(lambda: padded(lora_B, dtype), lora_B).transpose(-1, -2)
        forgetting = weakref.ref(owner, lambda _: entries.pop(key, None))
        entries[key] = _Entry(forgetting, state, lora_B.detach(), factor, {stream})
        return factor

    if stream not in entry.streams:
        workspace.follow(entry.factor)
        entry.streams.add(stream)
    return entry.factor


def clear() -> None:
    """Prepare each B again at its next use, as is needed after an edit through ``.data``."""
    entries.clear()


def padded(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of B in ``dtype``, (..., out_features, padded_columns(rank)), padded with zeros."""
    rank = lora_B.shape[-1]
    if rank == padded_columns(rank):
        return lora_B.detach().to(dtype).contiguous()
    prepared = lora_B.new_zeros(*lora_B.shape[:-1], padded_columns(rank), dtype=dtype)
    prepared[..., :rank] = lora_B.detach()
    return prepared


def _is_cacheable(lora_B: Tensor, owner: Tensor) -> bool:
    """Whether a copy may be kept. One made during the capture of a CUDA graph lives in the graph's memory."""
    return (
        lora_B.is_leaf
        and limits.is_tracked(owner)
        and not (lora_B.is_cuda and torch.cuda.is_current_stream_capturing())
    )
