"""MiCA adapters on `target_parameters`: every basis against an fp64 SVD, frozen, all or nothing."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.functional import cast_adapter_dtype

import mica.fast
from mica.fast.create import initialisation, solving
from mica.fast.forward.expert_params import (
    is_stack,
    lora_A_of,
    lora_B_of,
    parameter_of,
    weight_of_stack,
)
from mica.subspace import device, many
from tests.support.moe_models import (
    BUILDERS,
    ROUTER,
    STACKS,
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
from tests.support.peft_versions import needs_peft


def assert_frozen(model, adapter="default", trained=True):
    for name, layer in wrappers(model).items():
        assert not layer.lora_B[adapter].weight.requires_grad, name
        assert layer.lora_A[adapter].weight.requires_grad == trained, name
        assert not parameter_of(layer).requires_grad


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


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")  # PEFT counts no parameters
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


# -- all experts at once ----------------------------------------------------------------------------


def test_one_bar_counts_the_experts(monkeypatch):
    seen, updates = [], []

    class Bar(solving.tqdm):
        def __init__(self, *args, **kwargs):
            seen.append(kwargs)
            super().__init__(*args, **kwargs)

        def update(self, n=1):
            updates.append(n)
            return super().update(n)

    monkeypatch.setattr(solving, "tqdm", Bar)
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


@needs_peft("0.21", "it takes the shape of a partitioned parameter for empty")
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

    for module in (solving, initialisation):
        monkeypatch.setattr(module, "gather_params_ctx", gather)
    (layer,) = wrappers(wrap_holder(model)).values()
    assert len(gathered) == 2  # checked, then solved
    assert parameter.numel() == 0
    assert_same_vectors(lora_B_of(layer, "default"), exact_basis(weight, 2))


def test_the_process_without_weights_gets_its_bases_from_the_others(monkeypatch):
    """FSDP with cpu_ram_efficient_loading: it declines the very matrices that the first process solves."""
    monkeypatch.setattr(solving, "is_fsdp_enabled", lambda: True)
    declined, requested, share = [], [], solving.solve_shared

    def described(tasks):
        return [(task.name, task.weight.shape, task.weight.dtype, task.rank) for task in tasks]

    def sharing(tasks, **kwargs):
        requested.extend(described(tasks))
        return share(tasks, **kwargs)

    monkeypatch.setattr(solving, "decline", lambda tasks: declined.extend(described(tasks)))
    monkeypatch.setattr(solving, "solve_shared", sharing)
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
