"""Plain LoRA beside MiCA, left to stock or merged by it; the rest is among the kinds of `test_merging`."""

import copy

import pytest
import torch
from torch import nn

import mica.fast
from mica.fast.merge import merging
from tests.support.merging_models import (
    LORA,
    assert_same_bits,
    exact_merge,
    quietly,
    trained,
    weights,
    without_lora,
)
from tests.support.models import adapted_layers, net, randomise, stored
from tests.support.moe_models import second
from tests.support.stock import uninstalled
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.usefixtures("language")  # each test once with the C++ and once without

BF16 = torch.bfloat16


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("names", [["default", "second"], ["second", "default"], ["second"]])
def test_mica_and_plain_lora_on_one_layer_merge_and_unmerge_in_order(names, safe_merge):
    mica.fast.enable(lora=True)
    model = second(randomise(net(BF16, targets=LORA["targets"]), scale=0.3), init_lora_weights=False)
    before = weights(model)
    quietly(model.merge_adapter, names, safe_merge=safe_merge)
    report = mica.fast.merge_report(model)
    for name, layer in adapted_layers(model).items():
        assert layer.merged_adapters == list(vars(layer)[merging.RECORDS]) == names
        assert list(layer.lora_variant) == ["default"]
        exact = before[name]
        for adapter in names:
            exact = exact_merge(layer, exact, adapter)
        assert error(stored(layer), exact) <= 2 * RELATIVE[BF16]
        assert report.layers[name].weights == len(names) * stored(layer).numel()
    quietly(model.unmerge_adapter)
    assert_same_bits(model, before)


@pytest.mark.parametrize("off", [mica.fast.disabled, uninstalled, without_lora])
def test_plain_lora_that_stock_has_merged_is_unmerged_as_stock_does(off):
    """An old record of the adapter changes nothing."""
    model = trained("lora", BF16)
    stock = copy.deepcopy(model)
    if off is not uninstalled:
        model.merge_adapter()
        with uninstalled():
            model.unmerge_adapter()
            for name, weight in weights(stock).items():
                stored(model.get_submodule(name)).data = weight
    with off():
        model.merge_adapter()
    with mica.fast.disabled():
        stock.merge_adapter()
        stock.unmerge_adapter()
    quietly(model.unmerge_adapter)
    assert_same_bits(model, weights(stock))
    assert not any(merging.RECORDS in vars(layer) for layer in adapted_layers(model).values())


def with_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.base_model.model.up.base_layer)


def with_weight_that_is_no_parameter(model):
    """As in PEFT's nn.MultiheadAttention while it is merged."""
    base = model.base_model.model.up.base_layer
    weight = base.weight.detach()
    del base.weight
    base.weight = weight


LEFT_TO_STOCK = {
    "lora_bias": ({"lora_bias": True}, None),
    "a parametrized weight": ({}, with_weight_norm),
    "a weight that is no parameter": ({}, with_weight_that_is_no_parameter),
}


@pytest.mark.parametrize("case", LEFT_TO_STOCK)
def test_plain_lora_is_merged_by_stock_on(case):
    """To the bit, there and back."""
    config, change = LEFT_TO_STOCK[case]
    mica.fast.enable(lora=True)
    ours = randomise(net(BF16, targets=["up"], init_lora_weights=False, **config), scale=0.3)
    if change is not None:
        change(ours)
    theirs = copy.deepcopy(ours)
    ours.merge_adapter()
    with mica.fast.disabled():
        theirs.merge_adapter()
    assert_same_bits(ours, weights(theirs))
    assert not mica.fast.merge_report(ours).layers
    ours.unmerge_adapter()
    with mica.fast.disabled():
        theirs.unmerge_adapter()
    assert_same_bits(ours, weights(theirs))
