"""Tensors as they are in memory: which have one, and what it holds."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TENSOR_TYPES = (Tensor, torch.nn.Parameter)  # classes of tensors whose operations nothing intercepts
LAYER_TYPES = (*TENSOR_TYPES, FakeTensor)  # those with which a layer may run on the operators


def has_no_values(tensor: Tensor) -> bool:
    """Whether it is a shape alone, to count memory with: on the meta device or of FakeTensorMode."""
    return tensor.is_meta or type(tensor) is FakeTensor


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor with its values in its own memory; a copy if PyTorch has put an operation off.

    For code that reads memory itself: kernels, LAPACK.

    The imaginary part of a conjugate is negated lazily, and so is the gradient of ``torch.complex(x, y)``
    once that has been conjugated. A zero tensor, a tangent of forward-mode AD, has no memory at all. The
    conjugate bit itself needs complex numbers, which nothing here takes. An expanded tensor is as its strides
    say.
    """
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.resolve_neg() if tensor.is_neg() else tensor
