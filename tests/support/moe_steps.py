"""Adapted mixture-of-experts models whose A is not 0, and what a step of them runs."""

import torch

import mica.fast
from mica.fast.forward import expert_params
from tests.support.moe_models import BUILDERS, wrap_experts

STEP = ("experts_linear", "experts_linear_backward")


def filled(model, seed=1):
    """The adapted model with an A that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".lora_A." in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def adapted(kind="mixtral", dtype=torch.float32, **options):
    return filled(wrap_experts(BUILDERS[kind]().to(dtype), **options))


def outermost(model):
    return next(layer for layer in model.modules() if expert_params.is_wrapper(layer))


def wrappers(model):
    return {name: layer for name, layer in model.named_modules() if expert_params.is_wrapper(layer)}


def ran(function):
    """What it returns, and how often each operator of the experts ran."""
    before = {name: mica.fast.call_counts[name] for name in STEP}
    result = function()
    return result, tuple(mica.fast.call_counts[name] - before[name] for name in STEP)


def loss_of(model, ids):
    return model(ids, labels=ids).loss


def gradients(model, ids):
    """The loss and each A's gradient, and how often the operators ran."""
    model.zero_grad()

    def step():
        loss = loss_of(model, ids)
        loss.backward()
        return loss

    loss, counts = ran(step)
    grads = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    return loss.detach(), grads, counts
