"""A device that is not there: its tensors lie on the CPU, and mixing them with others fails, as on a GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # the one that every build of PyTorch has, and that needs no driver

_aten = torch.ops.aten


class OnDevice(torch.Tensor):
    """``host`` (on the CPU) as a tensor of `DEVICE`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, host.shape, device=DEVICE, **layout)
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of `ForeignDevice`")


class ForeignDevice(TorchDispatchMode):
    """Within it `DEVICE` exists."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        packet = function.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_inside = any(isinstance(tensor, OnDevice) for tensor in tensors)
        is_made_inside = kwargs.get("device") == DEVICE
        if not is_inside and not is_made_inside:
            return function(*args, **kwargs)
        outside = [tensor for tensor in tensors if tensor.ndim and not isinstance(tensor, OnDevice)]
        if outside and packet not in (_aten._to_copy, _aten.copy_):
            raise RuntimeError(f"{packet}: some of its tensors are on the CPU, others on {DEVICE}")
        stays = is_made_inside or kwargs.get("device") is None
        if is_made_inside:
            kwargs["device"] = torch.device("cpu")
        hosts, host_kwargs = tree_map(_host, (args, kwargs))
        result = function(*hosts, **host_kwargs)
        if function._schema.is_mutable:
            return _written(function, args, kwargs)
        if packet is _aten._to_copy and result is hosts[0]:
            result = result.clone()
        if not stays or packet is _aten._local_scalar_dense:
            return result
        return tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _written(function, args, kwargs):
    """What an operator in place, or one with ``out``, returns: those of its own arguments."""
    names = [argument.name for argument in function._schema.arguments if argument.is_write]
    out = [kwargs[name] for name in names if name in kwargs]
    if len(out) > 1:
        return tuple(out)
    return out[0] if out else args[0]


def _host(leaf):
    return leaf.host if isinstance(leaf, OnDevice) else leaf
