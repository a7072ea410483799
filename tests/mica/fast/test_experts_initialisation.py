"""MiCA adapters on `target_parameters`: every basis against an fp64 SVD, frozen, all or nothing."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from torch import nn

import mica.fast
from mica.errors import UnsuitableLayerError
from mica.fast import bases, initialisation
from mica.fast.expert_stacks import (
    is_stack,
    is_wrapper,
    lora_A_of,
    lora_B_of,
    parameter_of,
    weight_of_stack,
)
from mica.subspace import device, many
from tests.support.models import snapshot
from tests.support.moe_models import BUILDERS, ROUTER, STACKS, qwen3_moe, tokens, wrap_experts


def wrappers(model):
    return {name: module for name, module in model.named_modules() if is_wrapper(module)}


def exact_basis(weight, rank):
    """By the definition, in fp64: (..., out, rank)."""
    return torch.linalg.svd(weight.detach().double(), full_matrices=False).U[..., -rank:]


def assert_same_vectors(basis, exact):
    """Vector by vector and in the same order, up to signs: the singular values of these weights differ."""
    overlap = (basis.detach().double() * exact).sum(-2).abs()
    assert (overlap > 1 - 1e-6).all()


def assert_frozen(model, adapter="default", trained=True):
    for name, layer in wrappers(model).items():
        assert not layer.lora_B[adapter].weight.requires_grad, name
        assert layer.lora_A[adapter].weight.requires_grad == trained, name
        assert not parameter_of(layer).requires_grad


def second(model, **changes):
    config = copy.deepcopy(model.peft_config["default"])
    for name, value in changes.items():
        setattr(config, name, value)
    model.add_adapter("second", config)
    return model


class Stack(nn.Module):
    """A module with one parameter of the given weight, as a layer ``experts`` of ``Holder``."""

    def __init__(self, weight, name="down_proj", **attributes):
        super().__init__()
        setattr(self, name, nn.Parameter(weight, requires_grad=weight.is_floating_point()))
        vars(self).update(attributes)

    def forward(self, x):
        return x


def holder(weight, name="down_proj", **attributes):
    return nn.ModuleDict({"experts": Stack(weight, name, **attributes)})


def wrap_holder(model, rank=2, name="down_proj", **kwargs):
    return wrap_experts(model, rank, [f"experts.{name}"], **kwargs)


# -- bases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BUILDERS)
def test_b_of_every_expert_is_its_minor_subspace(kind, dtype):
    model = wrap_experts(BUILDERS[kind]().to(dtype), target_parameters=[*STACKS, ROUTER[kind]])
    layers = wrappers(model)
    assert len(layers) == 6
    for layer in layers.values():
        B, rank = lora_B_of(layer, "default"), 4
        assert_same_vectors(B, exact_basis(weight_of_stack(layer), rank))
        assert (B.mT @ B - torch.eye(rank)).abs().max() <= 1e-6  # exact over a 16-bit base, too
        assert B.dtype == torch.promote_types(dtype, torch.float32)
        assert not lora_A_of(layer, "default").any()
    assert_frozen(model)


def test_the_output_is_unchanged_and_only_a_is_trained():
    model = qwen3_moe()
    expected = model(input_ids=tokens()).logits
    model = wrap_experts(model).train()
    before = {name: lora_B_of(layer, "default").clone() for name, layer in wrappers(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        logits = model(input_ids=tokens()).logits
        if step == 0:
            torch.testing.assert_close(logits, expected)
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in wrappers(model).items():
        assert torch.equal(lora_B_of(layer, "default"), before[name])
        assert lora_A_of(layer, "default").any()


def test_target_modules_too_in_one_solve(solved):
    model = wrap_experts(qwen3_moe(), target_modules=["q_proj"])
    assert len(solved) == 2 * (6 + 6 + 1)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_variant
    assert_frozen(model)


def test_the_weight_of_a_linear_layer():
    model = wrap_experts(qwen3_moe(), target_parameters=["self_attn.v_proj.weight"])
    for layer in wrappers(model).values():
        assert not is_stack(layer)
        weight = parameter_of(layer)
        assert_same_vectors(layer.lora_B["default"].weight, exact_basis(weight, 4))


def test_rank_and_alpha_patterns():
    model = wrap_experts(qwen3_moe(), rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 6})
    for layer in wrappers(model).values():
        is_down = layer.parameter_name == "down_proj"
        assert lora_B_of(layer, "default").shape[2] == (2 if is_down else 4)
        assert layer.scaling["default"] == (3 if is_down else 2)


@pytest.mark.parametrize("kind", BUILDERS)
def test_halves_are_the_minor_subspaces_of_gate_and_up(kind):
    mica.fast.enable(gate_up="halves")
    for layer in wrappers(wrap_experts(BUILDERS[kind]().bfloat16())).values():
        B, weight = lora_B_of(layer, "default"), weight_of_stack(layer)
        assert (B.mT @ B - torch.eye(4)).abs().max() <= 1e-6
        if layer.parameter_name == "down_proj":
            assert_same_vectors(B, exact_basis(weight, 4))
            continue
        rows = torch.arange(layer.out_features)
        is_gate = rows % 2 == 0 if kind == "gpt_oss" else rows < layer.out_features // 2
        for mask, columns in ((is_gate, slice(0, 2)), (~is_gate, slice(2, 4))):
            assert_same_vectors(B[:, mask, columns], exact_basis(weight[:, mask], 2))
            assert not B[:, ~mask, columns].any()


def test_the_default_is_the_parameter_as_it_is_stored():
    assert mica.fast.settings.settings.gate_up == "fused"
    for layer in wrappers(wrap_experts(qwen3_moe())).values():
        assert (lora_B_of(layer, "default").abs().amax(1) > 0).all()
    with pytest.raises(ValueError, match=r"^gate_up must be one of \('fused', 'halves'\), but it is 'both'"):
        mica.fast.enable(gate_up="both")


def test_halves_of_other_parameters_are_not_taken():
    mica.fast.enable(gate_up="halves")
    weight = torch.randn(3, 8, 12)
    (layer,) = wrappers(wrap_holder(holder(weight))).values()
    assert_same_vectors(lora_B_of(layer, "default"), exact_basis(weight, 2))


# -- frozen -----------------------------------------------------------------------------------------


def test_b_stays_frozen_whatever_peft_does():
    model = second(wrap_experts(qwen3_moe().bfloat16()))
    assert_frozen(model, "default")
    assert_frozen(model, "second", trained=False)
    model.set_adapter("second")
    assert_frozen(model, "second")
    model.base_model.set_adapter(["default", "second"])
    assert_frozen(model, "default")
    for layer in wrappers(model).values():
        layer.set_adapter(["default"])
    assert_frozen(model, "default")
    model.base_model.set_requires_grad("default", True)
    assert_frozen(model, "default")
    with model.disable_adapter():
        pass
    assert_frozen(model, "default")
    cast_adapter_dtype(model, "default")
    assert_frozen(model, "default")
    model.delete_adapter("default")
    model.set_adapter("second")
    assert_frozen(model, "second")
    for layer in wrappers(model).values():
        assert_same_vectors(lora_B_of(layer, "second"), exact_basis(weight_of_stack(layer), 4))


def test_low_level_injection_keeps_the_exact_basis_for_a_later_cast():
    config = LoraConfig(r=4, init_lora_weights="mica", target_parameters=STACKS, target_modules=[])
    model = inject_adapter_in_model(config, qwen3_moe().bfloat16())
    for layer in wrappers(model).values():
        assert lora_B_of(layer, "default").dtype == torch.bfloat16
    cast_adapter_dtype(model, "default")
    for layer in wrappers(model).values():
        B = lora_B_of(layer, "default")
        assert (B.mT @ B - torch.eye(4)).abs().max() <= 1e-6
        assert not B.requires_grad


def test_a_second_adapter_gets_bases_of_its_own():
    model = wrap_experts(qwen3_moe())
    first = {name: layer.lora_B["default"].weight.clone() for name, layer in wrappers(model).items()}
    second(model, r=2)
    for name, layer in wrappers(model).items():
        assert torch.equal(layer.lora_B["default"].weight, first[name])
        assert_same_vectors(lora_B_of(layer, "second"), exact_basis(weight_of_stack(layer), 2))
    assert len(wrappers(model)) == 4


def test_plain_lora_is_left_alone(solved):
    torch.manual_seed(0)
    model = wrap_experts(qwen3_moe(), init_lora_weights=True)
    torch.manual_seed(0)
    expected = dict(wrap_experts(qwen3_moe(), stock=True).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert parameter.requires_grad == expected[name].requires_grad
    assert not solved


# -- all or nothing ---------------------------------------------------------------------------------


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


# -- all experts at once ----------------------------------------------------------------------------


def test_one_bar_counts_the_experts(monkeypatch):
    seen, updates = [], []

    class Bar(bases.tqdm):
        def __init__(self, *args, **kwargs):
            seen.append(kwargs)
            super().__init__(*args, **kwargs)

        def update(self, n=1):
            updates.append(n)
            return super().update(n)

    monkeypatch.setattr(bases, "tqdm", Bar)
    wrap_experts(qwen3_moe())
    ((kwargs,),) = [seen]
    assert (kwargs["total"], kwargs["unit"], sum(updates)) == (24, "expert", 24)


def test_experts_of_one_shape_are_one_batch_on_an_accelerator(monkeypatch, solved):
    monkeypatch.setattr(device, "ON_HOST", ())  # the CPU stands for one
    model = wrap_experts(qwen3_moe())
    assert sorted(solved) == [(12, 32, 24), (12, 48, 32)]
    for layer in wrappers(model).values():
        assert_same_vectors(lora_B_of(layer, "default"), exact_basis(weight_of_stack(layer), 4))


def test_a_second_initialisation_comes_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MICA_CACHE", str(tmp_path))
    first = wrappers(wrap_experts(qwen3_moe()))
    assert len(list(tmp_path.iterdir())) == 24
    monkeypatch.setattr(many, "solve_each", None)
    for name, layer in wrappers(wrap_experts(qwen3_moe())).items():
        assert torch.equal(lora_B_of(layer, "default"), lora_B_of(first[name], "default"))


def test_null_directions_of_many_experts_are_one_warning():
    weight = torch.randn(4, 12, 6)
    weight[:3, :, 0] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrap_holder(holder(weight))
    (text,) = {str(w.message) for w in caught if "null" in str(w.message)}
    assert text.startswith("1 of the 2 smallest singular values of layer 'experts.down_proj' expert 0")
    assert text.endswith("So it is for 2 more of this layer's experts.")


def test_partitioned_stacks_are_gathered_one_at_a_time(monkeypatch):
    """As DeepSpeed's ZeRO-3 does it: outside of a gathering context a parameter is empty."""
    model, weight, gathered = holder(torch.randn(3, 8, 12)), torch.randn(3, 8, 12), []
    parameter = model["experts"].down_proj
    parameter.ds_id, parameter.ds_shape, parameter.data = 0, weight.shape, weight.new_empty(0)

    @contextmanager
    def gather(parameter):
        gathered.append(parameter.ds_id)
        parameter.data = weight
        try:
            yield
        finally:
            parameter.data = weight.new_empty(0)

    for module in (bases, initialisation):
        monkeypatch.setattr(module, "gather_params_ctx", gather)
    (layer,) = wrappers(wrap_holder(model)).values()
    assert len(gathered) == 2  # checked, then solved
    assert parameter.numel() == 0
    assert_same_vectors(lora_B_of(layer, "default"), exact_basis(weight, 2))


def test_the_process_without_weights_gets_its_bases_from_the_others(monkeypatch):
    """FSDP with cpu_ram_efficient_loading: it declines the very matrices that the first process solves."""
    monkeypatch.setattr(bases, "is_fsdp_enabled", lambda: True)
    declined, requested, share = [], [], bases.solve_shared

    def described(tasks):
        return [(task.name, task.weight.shape, task.weight.dtype, task.rank) for task in tasks]

    def sharing(tasks, **kwargs):
        requested.extend(described(tasks))
        return share(tasks, **kwargs)

    monkeypatch.setattr(bases, "decline", lambda tasks: declined.extend(described(tasks)))
    monkeypatch.setattr(bases, "solve_shared", sharing)
    with torch.device("meta"):
        absent = holder(torch.randn(3, 8, 12))
    (layer,) = wrappers(wrap_holder(absent)).values()
    assert not requested
    assert layer.lora_B["default"].weight.is_meta
    wrap_holder(holder(torch.randn(3, 8, 12)))
    assert declined == requested
    assert len(requested) == 3


def test_inference_mode():
    """The solver's threads have their own mode, and cannot write to what this thread made."""
    expected = wrappers(wrap_experts(qwen3_moe()))
    with torch.inference_mode():
        model = wrap_experts(qwen3_moe())
    for name, layer in wrappers(model).items():
        assert torch.equal(lora_B_of(layer, "default"), lora_B_of(expected[name], "default"))


def test_low_cpu_mem_usage_without_a_file_leaves_the_adapter_on_the_meta_device(solved):
    config = LoraConfig(r=4, init_lora_weights="mica", target_parameters=STACKS, target_modules=[])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(qwen3_moe(), config, low_cpu_mem_usage=True)
    assert not solved
    assert all(layer.lora_B["default"].weight.is_meta for layer in wrappers(model).values())
