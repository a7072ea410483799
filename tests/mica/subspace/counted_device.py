"""A device that is not there: its tensors lie on the CPU, and what is asked of it is counted.

They report a device of their own, so that a product of one of them with a tensor of the host is the error
that it is on a GPU. A wait of the host is what synchronises with the stream in PyTorch's CUDA code: a number
or tensor that is read (``item``, ``bool``, ``tolist``, ``cpu``), a copy to the device without
``non_blocking``, a size that depends on values (``nonzero``, a mask as index), and linear algebra that reads
its ``info``: ``eigh``, ``svd``, ``cholesky``. Not ``cholesky_ex``, ``solve_triangular`` and ``qr``. Each
dispatched operator counts, views too. A list as index has no values here.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # the one that every build of PyTorch has, and that needs no driver

_aten = torch.ops.aten
_READ = {
    _aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.masked_select,
    _aten._linalg_eigh, _aten._linalg_svd, _aten._linalg_check_errors,
}  # fmt: skip
_COPIES = {_aten._to_copy, _aten.copy_}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_}


class OnDevice(torch.Tensor):
    """``host`` (on the CPU) as a tensor of `DEVICE`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, host.shape, device=DEVICE, **layout)
        self.host = host
        return self

    def tolist(self):  # PyTorch has none for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of `CountedDevice`")


class CountedDevice(TorchDispatchMode):
    """Within it `DEVICE` exists; ``waits`` and ``operators`` say what was asked of it, and how often."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        packet, name = function.overloadpacket, str(function.overloadpacket)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inside = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        outside = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        made_inside = kwargs.get("device") == DEVICE
        if not inside and not made_inside:
            return function(*args, **kwargs)
        self.operators[name] += 1
        stays = made_inside or (bool(inside) and kwargs.get("device") is None)
        if packet is _aten.copy_:
            stays = isinstance(args[0], OnDevice)
        if packet in _COPIES:
            blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            crosses = not inside or not stays or bool(outside)
            if crosses and (blocking or not stays):
                self.waits[name] += 1
        elif packet in _INDEXED:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool or not isinstance(index, OnDevice) for index in indices):
                self.waits[name] += 1
        elif any(tensor.ndim for tensor in outside):
            raise RuntimeError(f"{name}: some of its tensors are on the CPU, others on {DEVICE}")
        if packet in _READ:
            self.waits[name] += 1
        if made_inside:
            kwargs["device"] = torch.device("cpu")
        hosts = tree_map(_host, (args, kwargs))
        if packet is _aten._to_copy and not (inside and stays):
            hosts[1].pop("non_blocking", None)
            result = function(*hosts[0], **hosts[1])
            result = result.clone() if result is hosts[0][0] else result
        else:
            result = function(*hosts[0], **hosts[1])
        if function._schema.is_mutable:
            return _written(function, args, kwargs)
        if not stays:
            return result
        return tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _written(function, args, kwargs):
    """What an operator in place, or one with ``out``, returns: those of its own arguments."""
    names = [argument.name for argument in function._schema.arguments if argument.is_write]
    out = tuple(kwargs[name] for name in names if name in kwargs)
    return (out if len(out) > 1 else out[0]) if out else args[0]


def _host(leaf):
    return leaf.host if isinstance(leaf, OnDevice) else leaf
