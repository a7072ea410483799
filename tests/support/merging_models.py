"""Adapted models to merge: linear layers and an embedding, plain LoRA, or stacks of experts and routers."""

import warnings
from contextlib import contextmanager

import torch

import mica.fast
from tests.support.models import adapted_layers, factors, is_stored_as_in_out, net, randomise, stored
from tests.support.moe_models import BUILDERS, wrap_all

LINEAR = ["embed", "up", "down"]
# Of linear layers and a Conv1D. B is not 0 either.
LORA = {"targets": ["up", "conv", "down"], "init_lora_weights": False, "use_rslora": True}


def trained(kind="linear", dtype=torch.float32, scale=0.3, **config):
    """Their A are not 0. With plain LoRA ("lora") from here on `mica.fast` runs that, too."""
    if kind == "lora":
        mica.fast.enable(lora=True)
        return randomise(net(dtype, **LORA, **config), scale=scale).eval()
    if kind == "linear":
        return randomise(net(dtype, targets=LINEAR, **config), scale=scale).eval()
    return randomise(wrap_all(BUILDERS[kind]().to(dtype), **config), scale=scale).eval()


def weights(model):
    return {name: stored(layer).detach().clone() for name, layer in adapted_layers(model).items()}


def exact_merge(layer, weight, adapter="default"):
    """W + s·B·A in fp64, stored as the weight is."""
    A, B = factors(layer, adapter)
    update = layer.scaling[adapter] * (B.detach().double() @ A.detach().double())
    update = update.mT if is_stored_as_in_out(layer) else update
    return weight.double() + update.reshape(weight.shape)


def assert_same_bits(model, before):
    for name, weight in weights(model).items():
        assert torch.equal(weight.view(torch.uint8), before[name].view(torch.uint8)), name


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **kwargs)


@contextmanager
def without_lora():
    """Within it the backend runs MiCA only."""
    mica.fast.enable(lora=False)
    try:
        yield
    finally:
        mica.fast.enable(lora=True)
