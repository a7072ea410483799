"""Layers on one x, learnt as a group, and the comparison of their training with stock PEFT's."""

import torch
from torch import nn

import mica.fast
from tests.support.models import gradients, randomise, wrap
from tests.support.tolerances import error

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


class Three(nn.Module):
    """Layers on one x, called in an order that can be changed."""

    def __init__(self, width=6):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, width)
        self.order = "abc"
        self.between = lambda x: x

    def forward(self, x):
        outputs = []
        for name in self.order:
            outputs.append(getattr(self, name)(x))
            x = self.between(x)
        return self.last(sum(outputs))


def three(**kwargs):
    torch.manual_seed(0)
    return randomise(wrap(Three(), targets=["a", "b", "c", "last"], **kwargs))


def run(model, x):
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), {**gradients(model), "x": x.grad}


def learned(**kwargs):
    model = three(**kwargs)
    run(model, X)
    mica.fast.call_counts.clear()
    run(model, X)
    assert mica.fast.call_counts["linear_group"] == 1
    mica.fast.call_counts.clear()
    return model


def assert_equal(actual, expected, tolerance=1e-5):
    assert error(actual[0], expected[0]) <= tolerance
    assert actual[1].keys() == expected[1].keys()
    for name, grad in actual[1].items():
        assert error(grad, expected[1][name]) <= tolerance, name
