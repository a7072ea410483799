"""Layers whose backward computes x again, and what makes such an x.

The yardstick is a layer that is called on a clone of x, which is saved as it is.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

from mica.fast.forward.fast import call_cpp
from mica.ops.linear import linear_eager
from tests.support import models

FP32, FP64 = torch.float32, torch.float64
TOKENS, IN, OUT, RANK = 5, 64, 8, 3


class Layer:
    """``dtype``: of x and the weight; A is an fp32 master over 16 bits.

    Where C++ computes, it is called as PEFT's layer.
    """

    def __init__(self, dtype=FP32, seed=0, dropout=False):
        generator = torch.Generator().manual_seed(seed)
        wide = FP64 if dtype == FP64 else FP32
        self.weight = _frozen((torch.randn(OUT, IN, generator=generator) / 8).to(dtype))
        self.lora_A = nn.Parameter(torch.randn(RANK, IN, generator=generator).to(wide))
        self.lora_B = _frozen(torch.randn(OUT, RANK, generator=generator).to(wide))
        self.dropout = (0.25, torch.tensor([seed])) if dropout else (0.0, None)

        module = nn.Sequential(nn.Linear(IN, OUT, bias=False, dtype=dtype))
        self.module = models.wrap(module, RANK, ["0"], lora_alpha=RANK / 2).base_model.model[0]

    def __call__(self, x, autocast_dtype=None):
        is_plain = self.dropout[1] is None and autocast_dtype is None and not self.weight.is_inference()
        if is_plain and os.environ.get("MICA_NATIVE") == "1":
            self.module.base_layer.weight = self.weight
            self.module.lora_A["default"].weight = self.lora_A
            self.module.lora_B["default"].weight = self.lora_B
            return call_cpp(self.module, x)
        operands = x, self.weight, self.lora_A, self.lora_B, 0.5, None, None
        return linear_eager(*operands, *self.dropout, autocast_dtype)


def _frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def leaves(*dtypes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(TOKENS, IN, generator=generator).to(dtype).requires_grad_() for dtype in dtypes]


def gradients(y, *inputs, **options):
    return torch.autograd.grad(y.float().sin().sum(), inputs, materialize_grads=True, **options)


def assert_same(ours, expected):
    for mine, other in zip(ours, expected, strict=True):
        assert torch.equal(mine, other)


def as_saved(function):
    """What ``function(change)`` returns, which changes x so, has the bits of a saved x."""
    assert_same(function(lambda x: x), function(torch.clone))


def check(layers, make, inputs):
    """The gradients through all layers that share an x have the bits of a saved x."""

    def found(change):
        x = change(make())
        return gradients(sum(layer(x) for layer in layers), *[layer.lora_A for layer in layers], *inputs)

    as_saved(found)


def norm_weight(dtype):
    return torch.linspace(0.5, 2, IN).to(dtype)


def gated(gate, up):
    return F.silu(gate) * up


def rms_norm(h, _=None, eps=1e-6):
    """As models have it that are written in PyTorch's operators."""
    wide = h.to(FP32)
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return norm_weight(h.dtype) * (wide * rstd).to(h.dtype)


def of_shared(number, make=rms_norm, dtype=torch.bfloat16):
    """The outputs of so many layers that share an x, and the layers."""
    inputs = leaves(dtype, dtype)
    layers = [Layer(dtype, seed) for seed in range(number)]
    x = make(*inputs)
    return [layer(x) for layer in layers], layers
