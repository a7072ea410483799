"""Bytes that tensors take, counted as operators return them: also where these have shapes and no values.

What a step allocates follows from shapes and dtypes alone. On the meta device and on fake tensors PyTorch's
operators, those of bitsandbytes and this package's give shapes, and a mode adds up the storages that are
alive. PyTorch's own `torch.distributed._tools.mem_tracker.MemTracker` raises where a parameter is frozen.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators of bitsandbytes that allocate more than they return: its kernel for any device calls others.
_COMPOSITE = ("bitsandbytes::gemm_4bit", "bitsandbytes::int8_scaled_mm")
_ANY_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


class Alive(TorchDispatchMode):
    """Adds up the storages of all tensors that operators return, until they are gone.

    Attributes:
        bytes: Of those that are alive.
        peak: The most that ``bytes`` has been; it may be set anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def note(self, tensor: Tensor) -> int:
        """The bytes of its storage; 0 if it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return 0
        size = storage.nbytes()

        def forget(_) -> None:
            del self._storages[key]
            self.bytes -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        return size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in _COMPOSITE:
            with self:
                return func.redispatch(_ANY_DEVICE, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result


def held(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module, and the scales of those that bitsandbytes has quantised."""
    yield from module.buffers()
    for parameter in module.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        for holder in (parameter, state, getattr(state, "state2", None)):
            attributes = getattr(holder, "__dict__", {}).values()
            yield from (value for value in attributes if isinstance(value, Tensor))
