"""The output of an RMS norm in one pass of C++: PyTorch's bits, or nothing."""

import pytest
import torch

from mica import native
from mica.ops import norms
from tests.support.cpp import needs_cpp

BF16 = torch.bfloat16
TOKENS = 300  # on several threads
pytestmark = needs_cpp


def operands(columns):
    """weight, h and 1 / its root mean square"""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, TOKENS, columns, generator=generator).to(BF16)
    h[0, :2] = 0
    weight = torch.randn(columns, generator=generator).to(BF16).float()
    return weight, h, torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6)


def by_operators(weight, h, rstd, rounds):
    normed = h.float() * rstd
    return (weight * (normed.to(BF16).float() if rounds else normed)).to(BF16)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("columns", [1, 33, 576])
def test_it_has_the_bits_of_pytorch_s_operators(columns, rounds, monkeypatch):
    weight, h, rstd = operands(columns)
    weight[0] = 1e30
    rstd[1, 5] = 1e10  # more than bfloat16 holds
    expected = by_operators(weight, h, rstd, rounds)
    assert expected.isinf().any()
    assert torch.equal(native.module().norm(weight, h, rstd, rounds), expected)
    monkeypatch.setattr(native, "module_if_built", lambda: None)
    assert torch.equal(norms.norm(weight, h, rstd, rounds=rounds), expected)


OTHERS = {  # weight, h and rstd that are left to PyTorch
    "NaN": lambda weight, h, rstd: (weight, h.index_fill(2, torch.tensor([3]), torch.nan), rstd),
    "a subnormal h·rstd": lambda weight, h, rstd: (weight, h, rstd * 1e-39),
    "a subnormal product": lambda weight, h, rstd: (weight * 1e-39, h, rstd),
    "32 bits": lambda weight, h, rstd: (weight, h.float(), rstd),
    "a transpose": lambda weight, h, rstd: (weight, h.mT.contiguous().mT, rstd),
    "columns for rows": lambda weight, h, rstd: (weight, h, rstd.mT),
    "one number for all": lambda weight, h, rstd: (weight, h, rstd[:1, :1]),
    "a weight for each token": lambda weight, h, rstd: (weight.expand(TOKENS, -1).contiguous(), h, rstd),
    "no memory": lambda weight, h, rstd: (weight.to("meta"), h.to("meta"), rstd.to("meta")),
}


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_left_to_pytorch(name, rounds):
    assert native.module().norm(*OTHERS[name](*operands(33)), rounds) is None
