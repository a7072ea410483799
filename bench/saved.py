"""What a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def saved_bytes(
    forward: Callable[[], Tensor], without: Iterable[nn.Module], but: Iterable[Tensor] = ()
) -> int:
    """Bytes saved for the backward of ``forward()``, by storage, without these models' parameters.

    ``but``: further tensors that are there anyway. Counted through saved-tensor hooks. What a library keeps
    on its own in an autograd.Function is not seen; with bitsandbytes that is the packed weight, a parameter.
    """
    known = [*but, *(p for model in without for p in model.parameters())]
    parameters = {tensor.untyped_storage().data_ptr() for tensor in known}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, or the address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(size for size, _ in storages.values())
