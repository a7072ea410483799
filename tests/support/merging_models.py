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
    """Their A are not 0. With plain LoRA ("lora") or DoRA from here on `mica.fast` runs that, too."""
    if kind in ("lora", "dora"):
        mica.fast.enable(lora=True)
        model = randomise(net(dtype, **LORA, use_dora=kind == "dora", **config), scale=scale)
        return other_magnitudes(model).eval()
    if kind == "linear":
        return randomise(net(dtype, targets=LINEAR, **config), scale=scale).eval()
    return randomise(wrap_all(BUILDERS[kind]().to(dtype), **config), scale=scale).eval()


def other_magnitudes(model):
    """DoRA's, one of each layer 0, as after training."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= torch.linspace(0.7, 1.2, len(parameter)).to(parameter.dtype)
            parameter.data[2] = 0
    return model


def weights(model):
    return {name: stored(layer).detach().clone() for name, layer in adapted_layers(model).items()}


def exact_merge(layer, weight, adapter="default"):
    """W + s·B·A in fp64, with DoRA's norms where it has such; stored as the weight is."""
    A, B = factors(layer, adapter)
    update = layer.scaling[adapter] * (B.detach().double() @ A.detach().double())
    is_transposed = is_stored_as_in_out(layer)
    update = update.mT if is_transposed else update
    merged = weight.double() + update.reshape(weight.shape)
    if adapter not in layer.lora_magnitude_vector:
        return merged
    rows = merged.mT if is_transposed else merged
    magnitude = layer.lora_magnitude_vector[adapter].weight.detach().double()
    rows = rows * (magnitude / rows.norm(dim=1)).unsqueeze(1)
    return rows.mT if is_transposed else rows


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
