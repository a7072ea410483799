"""What the report counts: every weight of every chunk, by its value."""

import math

import pytest
import torch

import mica.fast
from mica.fast.merge import merging
from tests.support.merging_models import weights
from tests.support.models import adapted_layers, factors, net, randomise, stored
from tests.support.tolerances import RELATIVE

pytestmark = pytest.mark.usefixtures("language")  # one pass in C++, or PyTorch's operators


@pytest.mark.whole
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("adapters", [None, torch.float32, torch.float64])
def test_a_weight_is_unchanged_if_its_value_is(dtype, adapters, monkeypatch):
    """0 is -0, NaN is nothing, and an fp64 weight that moves less than fp32 shows has moved."""
    monkeypatch.setattr(merging, "CHUNK", 50)
    model = randomise(net(dtype), scale=1e-3)
    for layer in adapted_layers(model).values():
        lora_A, lora_B = factors(layer)
        if adapters is not None:
            lora_A.data = lora_A.data.to(adapters)
            lora_B.data = lora_B.data.to(adapters)
        lora_A.data.view(-1)[::2] = 0.0
        weight = stored(layer).data.view(-1)
        weight[::5] = 0.1
        weight[1::5] = -0.0
        weight[3] = math.nan
        weight[8] = math.inf
    before = weights(model)
    model.merge_adapter()
    report = mica.fast.merge_report(model)
    for name, layer in adapted_layers(model).items():
        stats = report.layers[name]
        assert stats.weights == before[name].numel()
        assert stats.unchanged == int((stored(layer) == before[name]).sum())


@pytest.mark.parametrize("chunk", [50, 2**18])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_leaves_with_its_layer_is_measured_in_every_eighth_row(dtype, chunk, monkeypatch):
    monkeypatch.setattr(merging, "CHUNK", chunk)
    model = randomise(net(dtype), scale=1e-3)
    before = weights(model)
    unloaded = model.merge_and_unload()
    report = mica.fast.merge_report(unloaded)
    for name, stats in report.layers.items():
        rows = before[f"base_model.model.{name}"][::8]
        assert stats.weights == rows.numel()
        assert stats.unchanged == int((unloaded.get_submodule(name).weight[::8] == rows).sum())
