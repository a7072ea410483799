"""Adapted mixture-of-experts models whose A is not 0, and what a step of them runs."""

import torch
from torch import nn

from tests.support.models import randomise
from tests.support.moe_models import BUILDERS, wrap_experts, wrappers
from tests.support.stock import as_stock, counted, step
from tests.support.tolerances import RELATIVE

STEP = ("experts_linear", "experts_linear_backward")


def adapted(kind="mixtral", dtype=torch.float32, **options):
    return randomise(wrap_experts(BUILDERS[kind]().to(dtype), **options))


class Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def block(experts, implementation):
    """Around experts of any class, whose stacks are adapted, with an A that is not 0."""
    experts.config._experts_implementation = implementation
    first = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
    return randomise(
        wrap_experts(Block(experts), target_parameters=[f"experts.{first}", "experts.down_proj"])
    )


def call_of(dtype=torch.float32, width=16):
    """Seven tokens of so many features, to two of four experts each."""
    index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    return torch.randn(7, width).to(dtype), index, torch.rand(7, 2).to(dtype)


def outermost(model):
    return next(iter(wrappers(model).values()))


def use(layer, implementation):
    """An implementation of transformers for the experts of an adapted layer."""
    layer.get_base_layer().config._experts_implementation = implementation
    return layer


def ran(function):
    """What it returns, and how often each operator of the experts ran."""
    result, counts = counted(function)
    return result, tuple(counts.get(name, 0) for name in STEP)


def loss_of(model, ids):
    return model(ids, labels=ids).loss


def gradients(model, ids):
    """The loss and each A's gradient, and how often the operators ran."""
    (loss, grads), counts = ran(lambda: step(model, ids, labels=ids))
    return loss, grads, counts


def as_stock_s(model, ids, dtype=torch.float32):
    """How often the operators ran in a step, whose loss and gradients are stock's."""
    tolerances = RELATIVE[dtype], 10 * RELATIVE[dtype]  # gradients have come through the whole model
    return ran(lambda: as_stock(lambda: step(model, ids, labels=ids), *tolerances))[1]
