import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from tests.support.linear_calls import embedding
from tests.support.tolerances import RELATIVE, error


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_opcheck(padding_idx):
    indices, lora_A, lora_B = torch.randint(0, 11, (3, 4)), torch.randn(2, 11), torch.randn(5, 2)
    arguments = (indices, lora_A.requires_grad_(), lora_B, 0.5, padding_idx, None)
    opcheck(torch.ops.mica.embedding.default, arguments)
    opcheck(
        torch.ops.mica.embedding_backward.default,
        (torch.randn(3, 4, 5), indices, lora_A.detach(), lora_B, 0.5, padding_idx),
    )


@pytest.mark.parametrize("padding_idx", [None, 0, 2, 5])
def test_agrees_with_torch(padding_idx):
    """With its gradient, by autograd and by function transforms."""
    lora_A, lora_B = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    indices = torch.tensor([[1, 2, 2], [0, 5, 2]])

    def ours(lora_A, indices):
        return embedding(indices, lora_A, lora_B, 0.7, padding_idx=padding_idx)

    def torchs(lora_A, indices):
        return F.embedding(indices, lora_A.t(), padding_idx=padding_idx) @ lora_B.t() * 0.7

    def by_autograd(loss):
        leaf = lora_A.clone().requires_grad_()
        return lambda _, indices: torch.autograd.grad(loss(leaf, indices), leaf)[0]

    assert error(ours(lora_A, indices), torchs(lora_A, indices)) <= RELATIVE[torch.float64]
    transforms = (
        by_autograd,
        torch.func.grad,
        lambda loss: torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0)),
        lambda loss: lambda A, i: torch.func.jvp(lambda A: loss(A, i), (A,), (torch.ones_like(A),))[1],
        torch.func.hessian,
    )
    for transform in transforms:
        actual, expected = (
            transform(lambda *args, f=f: f(*args).square().sum())(lora_A, indices) for f in (ours, torchs)
        )
        assert error(actual, expected) <= RELATIVE[torch.float64]


def test_autocast():
    lora_A, lora_B = torch.randn(2, 6), torch.randn(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding(torch.tensor([1, 2]), lora_A, lora_B).dtype == torch.bfloat16
        assert embedding(torch.tensor([1, 2]), lora_A.double(), lora_B).dtype == torch.float64
    assert embedding(torch.tensor([1, 2]), lora_A, lora_B).dtype == torch.float32
