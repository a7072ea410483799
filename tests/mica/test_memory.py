"""Tensors whose memory does not hold their values."""

import torch

from mica.memory import in_memory


def held(tensor: torch.Tensor) -> torch.Tensor:
    """What its memory holds, read past PyTorch."""
    return torch.from_numpy(tensor.numpy().copy())


def test_a_lazily_negated_tensor_is_negated():
    """As PyTorch itself makes them: the imaginary part of a conjugate."""
    lazy = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    assert lazy.is_neg()
    assert torch.equal(held(in_memory(lazy)), -torch.ones(3))


def test_a_zero_tensor_has_memory():
    zero = torch._efficientzerotensor((2, 3))
    assert zero.data_ptr() == 0
    assert torch.equal(held(in_memory(zero)), torch.zeros(2, 3))
    assert torch.equal(held(in_memory(torch._neg_view(zero))), torch.zeros(2, 3))
