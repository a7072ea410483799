"""PyTorch's own 16-bit products through fp32, so that a whole 16-bit model can be tested on any processor."""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mica.paths import products

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class _ThroughFp32(TorchDispatchMode):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def _is_narrow(self, value) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == self.dtype and value.device.type == "cpu"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in _PRODUCTS or not self._is_narrow(args[-1]):
            return function(*args, **(kwargs or {}))
        wide = tree_map(
            lambda value: value.float() if self._is_narrow(value) else value, (args, kwargs or {})
        )
        return function(*wide[0], **wide[1]).to(self.dtype)


def quick_products(dtype: torch.dtype):
    """Around a model in this dtype, stock or ours, forward and backward.

    On a processor without 16-bit instructions layers that are not adapted, and all of stock's, take minutes a
    step in PyTorch's own loops. Elsewhere it does nothing.
    """
    return nullcontext() if products.has_native(dtype) else _ThroughFp32(dtype)
