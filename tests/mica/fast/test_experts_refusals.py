"""MiCA adapters on `target_parameters` that cannot be created: said clearly, and nothing has changed."""

import pytest
import torch
from torch import nn

import mica.fast
from mica.errors import UnsuitableLayerError
from mica.fast.forward.expert_params import lora_B_of, parameter_of
from mica.subspace import many
from tests.support.models import snapshot
from tests.support.moe_models import (
    assert_same_vectors,
    exact_basis,
    holder,
    qwen3_moe,
    second,
    tokens,
    wrap_experts,
    wrap_holder,
    wrappers,
)


def refused(model, match, error=UnsuitableLayerError, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        wrap_experts(model, **kwargs)
    assert snapshot(model) == before
    assert not hasattr(model, "peft_config")


def poisoned(model, layer=1, expert=3):
    with torch.no_grad():
        model.model.layers[layer].mlp.experts.down_proj[expert, 1, 2:4] = float("nan")
    return model


def test_not_finite_names_layer_parameter_and_expert(solved):
    what = r"'model.layers.1.mlp.experts.down_proj' has 2 NaN or Inf of 4608, in expert 3\.$"
    refused(poisoned(qwen3_moe()), what, target_modules=["q_proj"])
    assert not solved
    broken = poisoned(poisoned(qwen3_moe()), expert=5)
    refused(broken, r"has 4 NaN or Inf of 4608, in experts 3, 5\.$")


def test_rank_too_large_names_layer_and_parameter(solved):
    what = r"got r=25 for layer 'model.layers.0.mlp.experts.down_proj' .*\(6, 32, 24\) \(max usable r is 24\)"
    refused(qwen3_moe(), what, rank=25)
    assert not solved


def test_a_failing_solver_leaves_the_model_as_it_was(monkeypatch):
    def failing(weight, rank, **kwargs):
        raise ValueError("no luck")

    monkeypatch.setattr(many, "solve_each", failing)
    refused(qwen3_moe(), r"from layer 'model.layers.\d.mlp.experts.(gate_up|down)_proj' expert \d: no luck")


@pytest.mark.parametrize("changes", [{"r": 25}, {"r": 5}])
def test_a_second_adapter_that_fails_leaves_the_first(changes, monkeypatch):
    """In the check (25), or in the solver when all wrappers have the new adapter (5)."""
    model = wrap_experts(qwen3_moe())
    solver, before = many.solve_each, snapshot(model)
    logits = model(input_ids=tokens()).logits
    monkeypatch.setattr(
        many, "solve_each", lambda weight, rank, **_: solver(weight, 99 if rank == 5 else rank)
    )
    with pytest.raises(UnsuitableLayerError, match=r"layer 'model.layers.0.mlp.experts"):
        second(model, **changes)
    assert snapshot(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(input_ids=tokens()).logits, logits)


def test_skip_leaves_a_parameter_out_and_says_so(tmp_path):
    mica.fast.enable(on_unsuitable="skip")
    with pytest.warns(UserWarning, match=r"experts.down_proj' has 2 NaN .* left without an adapter"):
        model = wrap_experts(poisoned(qwen3_moe()))
    prefix = "base_model.model.model.layers"
    assert {name: layer.parameter_name for name, layer in wrappers(model).items()} == {
        f"{prefix}.0.mlp.experts": "down_proj",
        f"{prefix}.0.mlp.experts.base_layer": "gate_up_proj",
        f"{prefix}.1.mlp.experts": "gate_up_proj",
    }
    targeted = sorted(model.peft_config["default"].target_parameters)
    assert targeted == sorted(model.base_model.targeted_parameter_names)
    assert len(targeted) == 3
    # what is saved names exactly these, for stock PEFT too
    again = wrap_experts(poisoned(qwen3_moe()), stock=True, target_parameters=targeted)
    assert wrappers(again).keys() == wrappers(model).keys()
    with pytest.raises(UnsuitableLayerError, match=r"r=25 .*A further adapter cannot skip it"):
        second(model, r=25)
    assert list(model.peft_config) == ["default"]


def test_nothing_suitable_is_an_error():
    mica.fast.enable(on_unsuitable="skip")
    with pytest.warns(UserWarning, match="left without an adapter"):
        refused(qwen3_moe(), "none of the 4 target parameters", rank=64)


@pytest.mark.parametrize(
    ("rank", "out", "match", "error"),
    [
        (3, 8, r"r must be even, but it is 3 for layer 'experts.gate_up_proj'", ValueError),
        (4, 9, r"but layer 'experts.gate_up_proj' has 9 out_features", UnsuitableLayerError),
        (10, 8, r"r=10 for layer 'experts.gate_up_proj' .*\(max usable r is 8\)", UnsuitableLayerError),
    ],
)
def test_halves_that_are_none(rank, out, match, error):
    mica.fast.enable(gate_up="halves")
    model = holder(torch.randn(3, out, 12), "gate_up_proj")
    refused(model, match, error, rank=rank, target_parameters=["experts.gate_up_proj"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_packed_experts_are_refused(dtype):
    model = holder(torch.zeros(3, 8, 12).to(dtype))
    what = rf"'experts.down_proj' has a weight of dtype {dtype}. Experts in 8 or 4 bits .* dequantised"
    refused(model, what, TypeError, rank=2, target_parameters=["experts.down_proj"])


def test_a_single_expert():
    weight = torch.randn(1, 8, 12)
    (layer,) = wrappers(wrap_holder(holder(weight))).values()
    assert_same_vectors(lora_B_of(layer, "default"), exact_basis(weight, 2))
    model, target = holder(weight, is_transposed=True), ["experts.down_proj"]
    refused(model, r"single expert of shape \(1, 8, 12\) stored as", rank=2, target_parameters=target)


def test_experts_that_do_not_say_that_they_are_transposed():
    """Llama 4's. PEFT would take B for the side of the inputs."""
    model = holder(torch.randn(3, 6, 16), "gate_up_proj")
    model["experts"].down_proj = nn.Parameter(torch.randn(3, 8, 6))
    target = ["experts.gate_up_proj", "experts.down_proj"]
    what = r"'experts.gate_up_proj', because .* their Stack has no attribute `is_transposed`"
    refused(model, what, rank=2, target_parameters=target)
    model["experts"].is_transposed = True
    for layer in wrappers(wrap_experts(model, 2, target)).values():
        stored = parameter_of(layer).mT
        assert_same_vectors(lora_B_of(layer, "default"), exact_basis(stored, 2))


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({"_is_expert_parallel": True}, "holds the experts of one process only"),
        ({"_hf_tp_plan": "grouped_gemm"}, "holds one shard of it"),
    ],
)
def test_a_part_of_the_experts_is_refused(attributes, match):
    model = holder(torch.randn(3, 8, 12), **attributes)
    refused(model, f"'experts.down_proj' {match}", rank=2, target_parameters=["experts.down_proj"])


def test_experts_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = holder(torch.randn(3, 8, 12))
    refused(
        model, "'experts.down_proj' is on the meta device", rank=2, target_parameters=["experts.down_proj"]
    )


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_peft_refuses_of_lora_it_refuses_of_mica(option):
    """With its own words; DoRA it refuses in combination with MiCA already."""
    with pytest.raises(ValueError, match=f"{next(iter(option))}|DoRA"):
        wrap_experts(qwen3_moe(), **option)
