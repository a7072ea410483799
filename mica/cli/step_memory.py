"""The memory of a training step, counted with a model without values: nothing of it is allocated.

What a step allocates follows from shapes and dtypes alone. On the meta device PyTorch's operators and this
package's give shapes, and a mode adds up the storages that are alive; there is no autocast on that device.
PyTorch's own `torch.distributed._tools.mem_tracker.MemTracker` raises where a parameter is frozen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

# For ``attn_implementation``. PyTorch's own choice looks at values, and needs a GPU for flash attention.
ATTENTION = "counted"  # a name with "flash" in it would be looked for on the Hub


def _flash_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """For the backward it keeps q, k, v, the output and a number for each row; no mask."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    output, *_ = flash(query, key, value, dropout, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _flash_attention)


class StepMemory(NamedTuple):
    """Bytes. ``kept`` and ``peak`` are in addition to those of the weights."""

    weights: int  # with adapters and buffers
    kept: int  # after the forward, for the backward: the loss and its graph
    peak: int  # at any time of the step, with the gradients


class _Alive(TorchDispatchMode):
    """Adds up the storages of all tensors that operators return, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def forget(_) -> None:
            del self._storages[key]
            self.bytes -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result


def count(model: nn.Module, loss: Callable[[], Tensor]) -> StepMemory:
    """What ``loss()`` of the model and its backward allocate. The gradients are cleared again."""
    with _Alive() as alive:
        for tensor in (*model.parameters(), *model.buffers()):
            alive.note(tensor)
        weights = alive.bytes
        result = loss()
        kept = alive.bytes - weights
        result.backward()
        peak = alive.peak - weights
    model.zero_grad()
    return StepMemory(weights, kept, peak)
