"""Tensors whose memory does not hold their values, for code that reads memory itself: kernels, LAPACK."""

from torch import Tensor


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where PyTorch has left something undone: what its memory holds is it.

    The imaginary part of a conjugate is negated lazily, and so is the gradient of ``torch.complex(x, y)``
    once that has been conjugated. A zero tensor, a tangent of forward-mode AD, has no memory at all. The
    conjugate bit itself needs complex numbers, which nothing here takes. An expanded tensor is as its strides
    say.
    """
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.resolve_neg() if tensor.is_neg() else tensor
