"""One batch, a different adapter for each sample: PEFT's ``adapter_names``, for inference.

MiCA adapters created on one base share B: the basis of rank 8 is the last 8 columns of that of rank 16. Where
they are equal bit for bit, every sample's h goes into the columns of the widest B, and one up-projection
serves the whole batch. The others each get their own, on their samples.

Which adapters share has to be known at each call. On a CPU every B is compared at every call: it is right
after any edit. On another device the host would have to wait for the device's answer in each layer, at each
decoding step, so there the comparison is kept as long as each compared B has the same address and count of
in-place writes; its storage is kept alive (`_Comparison.compared`), since an adapter loaded later under the
same name could get the same address and count. PyTorch does not count writes through ``.data``: code that
makes some calls `mica.fast.clear_caches`, which calls `clear`.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mica.fast.forward import tensor_parallel
from mica.fast.forward.eligibility import Adapter
from mica.fast.settings import compute_dtype
from mica.kernels import limits
from mica.ops.low_rank import down_projection, up_projection

BASE = "__base__"  # PEFT's name for "no adapter"


class _Shared(NamedTuple):
    names: list[str]
    lora_B: Tensor  # the widest of theirs


class _Comparison(NamedTuple):
    state: tuple  # of each B, in the order of the names
    compared: list[Tensor]  # every B: its address must not be reused
    groups: list[_Shared]


_comparisons: WeakKeyDictionary[nn.Module, _Comparison] = WeakKeyDictionary()


def names_on(layer, x: Tensor, adapter_names: list[str]) -> list[str] | str:
    """The adapters of this layer that the samples have, or why the call is PEFT's."""
    names = [name for name in dict.fromkeys(adapter_names) if name != BASE and name in layer.lora_A]
    if not names or len(x) != len(adapter_names):
        return "a mixed batch without an adapter of this layer"
    if torch.compiler.is_compiling():
        return "a compiled mixed batch"
    if tensor_parallel.plan_of(layer.get_base_layer()) is not None:
        return "a mixed batch under tensor parallelism"
    if any(layer.lora_dropout[name].training for name in names):
        return "a mixed batch with dropout in training mode"
    return names


class MixedBatch(NamedTuple):
    """A linear layer on x (batch, ..., in_features), with a different adapter for each sample."""

    layer: nn.Module
    adapter_names: list[str]  # one per sample; "__base__" and unknown ones add nothing
    adapters: dict[str, Adapter]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.layer.base_layer(x)
        for group in _groups(self.layer, {name: of.lora_B for name, of in self.adapters.items()}):
            names = [name for name in self.adapter_names if name in group.names]
            if len(names) == len(x):
                y = up_projection(y, self._h(x, names, group), group.lora_B)
            else:  # nothing of another sample: 0 times a B that has diverged would be NaN
                index = _rows(self.adapter_names, group.names, x.device)
                update = up_projection(y[index], self._h(x[index], names, group), group.lora_B)
                y = y.index_copy(0, index, update)
        return y

    def _h(self, x: Tensor, names: list[str], group: _Shared) -> Tensor:
        """(samples, ..., rank of the widest B): each sample's h in the columns of its adapter."""
        rank, h = group.lora_B.shape[1], None
        for name in group.names:
            index = _rows(names, [name], x.device)
            lora_A, _, scaling, _ = self.adapters[name]
            part = down_projection(x[index], lora_A, scaling, compute_dtype(x.dtype), 0.0, None)
            if h is None:
                h = part.new_zeros(*x.shape[:-1], rank)
            h[index, ..., rank - part.shape[-1] :] = part
        return h


def _rows(adapter_names: list[str], names: list[str], device: torch.device) -> Tensor:
    """The samples that have one of these adapters."""
    return torch.tensor([row for row, name in enumerate(adapter_names) if name in names], device=device)


def clear() -> None:
    """Compare every B anew at its next use."""
    _comparisons.clear()


def _groups(layer, parameters: dict[str, Tensor]) -> list[_Shared]:
    """The adapters grouped by the B that they share, widest first; compared again once a B has changed."""
    weights = {name: B.detach() for name, B in parameters.items()}
    if not all(map(notes_its_changes, parameters.values())):
        return _compare(weights)
    state = tuple(
        (name, B.data_ptr(), B._version, B.dtype, B.shape, B.stride()) for name, B in weights.items()
    )
    cached = _comparisons.get(layer)
    if cached is None or cached.state != state:
        cached = _comparisons[layer] = _Comparison(state, list(weights.values()), _compare(weights))
    return cached.groups


def notes_its_changes(lora_B: Tensor) -> bool:
    """Whether a comparison of this B may be kept; False on a CPU, where it costs less than it could lose."""
    return not lora_B.is_cpu and limits.is_tracked(lora_B)


def _compare(weights: dict[str, Tensor]) -> list[_Shared]:
    groups: list[_Shared] = []
    for name, lora_B in sorted(weights.items(), key=lambda item: -item[1].shape[1]):
        rank = lora_B.shape[1]
        for group in groups:
            if group.lora_B.dtype == lora_B.dtype and torch.equal(group.lora_B[:, -rank:], lora_B):
                group.names.append(name)
                break
        else:
            groups.append(_Shared([name], lora_B))
    return groups
