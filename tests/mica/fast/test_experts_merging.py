"""Merging stacks of experts: one rounding, every bit back, nested wrappers; the rules of linear layers."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mica.fast
from mica.fast.forward.expert_params import is_stored_as_in_out, lora_A_of, lora_B_of, parameter_of
from mica.fast.merge import merging
from tests.support.models import randomise
from tests.support.moe_models import (
    BUILDERS,
    ROUTER,
    STACKS,
    gpt_oss,
    qwen3_moe,
    tokens,
    wrap_experts,
    wrappers,
)
from tests.support.tolerances import RELATIVE, error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained(kind="qwen3_moe", dtype=torch.float32, scale=0.3, **config):
    model = BUILDERS[kind]().to(dtype)
    target = [*STACKS, ROUTER[kind]]
    return randomise(wrap_experts(model, target_parameters=target, **config), scale=scale).eval()


def stacks(model):
    return {name: parameter_of(layer).detach().clone() for name, layer in wrappers(model).items()}


def exact_merge(layer, weight, adapter="default"):
    """W + s·B·A in fp64, stored as the weight is."""
    A, B = lora_A_of(layer, adapter).double(), lora_B_of(layer, adapter).double()
    update = layer.scaling[adapter] * (B @ A)
    update = update.mT if is_stored_as_in_out(layer) else update
    return weight.double() + update.detach().reshape(weight.shape)


def assert_same_bits(model, before):
    for name, weight in stacks(model).items():
        assert torch.equal(weight.view(torch.uint8), before[name].view(torch.uint8)), name


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **kwargs)


@pytest.fixture(params=[None, 1], ids=["one chunk", "one row per chunk"])
def _chunked(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(merging, "_CHUNK", request.param)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merges_in_fp32_and_rounds_once_and_unmerges_to_the_bit(kind, dtype, safe_merge):
    model = trained(kind, dtype)
    before = stacks(model)
    quietly(model.merge_adapter, safe_merge=safe_merge)
    eps = torch.finfo(dtype).eps
    for name, layer in wrappers(model).items():
        merged, exact = parameter_of(layer), exact_merge(layer, before[name])
        assert merged.dtype == dtype
        assert not torch.equal(merged, before[name])
        assert ((merged.double() - exact).abs() <= 0.5 * eps * exact.abs() * 1.01 + 1e-6).all()
    quietly(model.unmerge_adapter)
    assert_same_bits(model, before)


def test_stock_loses_what_this_keeps():
    model = trained(dtype=torch.bfloat16, scale=0.02)
    before = stacks(model)
    with mica.fast.disabled():
        model.merge_adapter()
        model.unmerge_adapter()
    assert any(not torch.equal(weight, before[name]) for name, weight in stacks(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BUILDERS)
def test_outputs_merged_disabled_and_unloaded(kind, dtype):
    """All layers of nested wrappers; within `disable_adapter` a merged model is unmerged."""
    model, tolerance = trained(kind, dtype), 10 * RELATIVE[dtype]  # stock's forward rounds W + s·B·A twice
    before, expected = stacks(model), logits(model)
    base = logits(BUILDERS[kind]().to(dtype))
    model.merge_adapter()
    assert error(logits(model), expected) <= tolerance
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert_same_bits(model, before)
    unloaded = model.merge_and_unload()
    assert not wrappers(unloaded)
    assert error(logits(unloaded), expected) <= tolerance
    assert len(mica.fast.merge_report(unloaded).layers) == 6


def test_unload_without_merging():
    model = trained()
    unloaded = model.unload()
    assert not wrappers(unloaded)
    assert torch.equal(logits(unloaded), logits(qwen3_moe()))


def test_adapter_may_change_while_merged():
    model = trained(dtype=torch.bfloat16)
    before = stacks(model)
    for seed in range(3):
        model.merge_adapter()
        randomise(model, seed=seed)
        for layer in wrappers(model).values():
            layer.scaling["default"] = 17.0
        quietly(model.unmerge_adapter)
    assert_same_bits(model, before)


def test_two_adapters_merge_and_unmerge_in_order():
    model = trained(dtype=torch.bfloat16)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    randomise(model, scale=0.5, seed=3)
    before = stacks(model)
    quietly(model.merge_adapter, ["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter(["default"])
    assert all(layer.merged_adapters == ["default", "second"] for layer in wrappers(model).values())
    quietly(model.unmerge_adapter)
    assert_same_bits(model, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_next_to_plain_lora_which_stock_merges():
    model = trained()
    config = copy.deepcopy(model.peft_config["default"])
    config.init_lora_weights = False
    model.add_adapter("plain", config)
    before = stacks(model)
    quietly(model.merge_adapter, ["default", "plain"])
    for name, layer in wrappers(model).items():
        assert layer.merged_adapters == ["plain", "default"]
        assert list(vars(layer)[merging.RECORDS]) == ["default"]
        exact = exact_merge(layer, exact_merge(layer, before[name]), "plain")
        assert error(parameter_of(layer), exact) <= RELATIVE[torch.float32]
    quietly(model.unmerge_adapter)
    for name, weight in stacks(model).items():
        assert error(weight, before[name]) <= RELATIVE[torch.float32]


@pytest.mark.parametrize("edit", ["value", "dtype"])
def test_an_edit_while_merged_is_seen_and_said(edit):
    model = trained(dtype=torch.bfloat16)
    name, layer = next(iter(wrappers(model).items()))
    before = stacks(model)[name]
    model.merge_adapter()
    if edit == "value":
        parameter_of(layer).data[1, 0, 0] += 1
    else:
        layer.get_base_layer().float()
    with pytest.warns(UserWarning, match="edited, cast or moved"):
        model.unmerge_adapter()
    restored = parameter_of(layer).detach().double()
    restored[1, 0, 0] = before[1, 0, 0]
    assert error(restored, before) <= 2 * RELATIVE[torch.bfloat16]


def test_disabling_in_between_still_unmerges_to_the_bit():
    model = trained(dtype=torch.bfloat16)
    before = stacks(model)
    model.merge_adapter()
    with mica.fast.disabled():
        quietly(model.unmerge_adapter)
    assert_same_bits(model, before)


def test_what_stock_merged_is_unmerged_by_subtraction():
    model = trained()
    before = stacks(model)
    with mica.fast.disabled():
        model.merge_adapter()
    with pytest.warns(UserWarning, match="no record of its merge"):
        model.unmerge_adapter()
    for name, weight in stacks(model).items():
        assert error(weight, before[name]) <= RELATIVE[torch.float32]


def test_what_stock_merges_is_not_undone_with_an_old_record():
    model = trained()
    before = stacks(model)
    model.merge_adapter()
    with mica.fast.disabled():
        model.unmerge_adapter()
        randomise(model, scale=3.0, seed=9)
        model.merge_adapter()
        model.unmerge_adapter()
    for name, weight in stacks(model).items():
        assert error(weight, before[name]) <= 20 * RELATIVE[torch.float32]


def test_uninstalling_gives_stock_s_methods_back():
    from peft.tuners.lora import ParamWrapper

    ours = ParamWrapper.merge, ParamWrapper.unmerge, ParamWrapper.update_layer
    mica.fast.uninstall()
    stock = ParamWrapper.merge, ParamWrapper.unmerge, ParamWrapper.update_layer
    try:
        assert all(function.__module__ == "peft.tuners.lora.layer" for function in stock)
        assert all(a.__wrapped__ is b for a, b in zip(ours, stock, strict=True))
    finally:
        mica.fast.enable()


def test_broken_adapter_is_refused_by_safe_merge():
    model = trained()
    before = stacks(model)
    layer = list(wrappers(model).values())[1]
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert_same_bits(model, before)
    assert not layer.merged_adapters
    assert merging.RECORDS not in vars(layer)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_computed_parameter_is_refused_before_anything_is_merged():
    model = trained()
    before = stacks(model)
    layer = list(wrappers(model).values())[-2]
    parametrize.register_parametrization(layer.get_base_layer(), layer.parameter_name, Doubled())
    with pytest.raises(
        ValueError, match=rf"remove_parametrizations\(layer.base_layer, '{layer.parameter_name}'"
    ):
        model.merge_adapter()
    assert not any(layer.merged_adapters for layer in wrappers(model).values())
    parametrize.remove_parametrizations(
        layer.get_base_layer(), layer.parameter_name, leave_parametrized=False
    )
    assert_same_bits(model, before)


def test_report_has_a_row_for_every_parameter():
    model = trained(dtype=torch.bfloat16, scale=0.02)
    before = stacks(model)
    model.merge_adapter()
    update_squared = error_squared = 0.0
    for name, layer in wrappers(model).items():
        update = exact_merge(layer, before[name]) - before[name].double()
        moved = parameter_of(layer).double() - before[name].double()
        update_squared += update.square().sum().item()
        error_squared += (moved - update).square().sum().item()
    expected = (error_squared / update_squared) ** 0.5
    report = mica.fast.merge_report(model)
    assert report.swallowed == pytest.approx(expected, rel=1e-4)
    prefix = "base_model.model.model.layers.{}.mlp.{}"
    assert set(report.layers) == {
        prefix.format(layer, name)
        for layer in (0, 1)
        for name in ("experts.down_proj", "experts.gate_up_proj", "gate")
    }
    model.unmerge_adapter()
    assert not mica.fast.merge_report(model).layers
    unloaded = model.merge_and_unload()
    report = mica.fast.merge_report(unloaded)
    assert report.swallowed == pytest.approx(expected, rel=1e-4)
    assert "model.layers.1.mlp.experts.gate_up_proj" in report.layers


def test_a_deep_copy_unmerges_to_the_bit_and_a_pickle_by_subtraction():
    model = trained(dtype=torch.bfloat16)
    before = stacks(model)
    model.merge_adapter()
    clone, pickled = copy.deepcopy(model), pickle.dumps(model)
    quietly(clone.unmerge_adapter)
    assert_same_bits(clone, before)
    assert b"mica.fast" not in pickled
    loaded = pickle.loads(pickled)
    with pytest.warns(UserWarning, match="no record of its merge"):
        loaded.unmerge_adapter()


def test_within_autocast_and_inference_mode():
    model = trained(dtype=torch.bfloat16)
    before = stacks(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(model, before)


def test_rank_1():
    model = randomise(wrap_experts(gpt_oss(), rank=1))
    before = stacks(model)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert_same_bits(model, before)
