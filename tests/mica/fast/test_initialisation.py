"""New adapters of layers and of experts: every basis against an fp64 SVD, in its order, and frozen."""

import copy
import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.functional import cast_adapter_dtype

import mica.fast
from mica.errors import UnsuitableLayerError
from tests.support import quantised_models
from tests.support.models import (
    Net,
    adapted_layers,
    assert_same_bases,
    bases,
    factors,
    net,
    oriented,
    randomise,
)
from tests.support.moe_models import (
    BUILDERS,
    STACKS,
    assert_exact,
    exact_basis,
    holder,
    qwen3_moe,
    second,
    wrap_all,
    wrap_experts,
    wrap_holder,
    wrappers,
)
from tests.support.peft_versions import is_at_least
from tests.support.quantised_models import KINDS as QUANTISED
from tests.support.tolerances import RELATIVE

KINDS = ["layers", *BUILDERS]
CASES = [*itertools.product(KINDS, RELATIVE), *((kind, torch.float32) for kind in QUANTISED)]
LAYER, EXPERTS = {"target_modules": ["up"]}, {"target_modules": [], "target_parameters": STACKS}
of_layer_and_experts = pytest.mark.parametrize(("build", "targets"), [(Net, LAYER), (qwen3_moe, EXPERTS)])


def adapted(kind="layers", dtype=torch.float32, **config):
    """A net of one layer of each kind, a model's stacks and routers, or one with quantised layers."""
    if kind in QUANTISED:
        return quantised_models.adapted(kind, **config)
    if kind == "layers":
        return net(dtype, **config)
    return wrap_all(BUILDERS[kind]().to(dtype), **config)


def assert_frozen(model, adapter="default", trained=True):
    for name, layer in wrappers(model).items():
        assert not layer.lora_B[adapter].weight.requires_grad, name
        assert layer.lora_A[adapter].weight.requires_grad == trained, name
        assert not layer.get_param().requires_grad


# -- bases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_b_spans_the_minor_subspace_and_a_is_zero(kind, dtype):
    """Exact over a 16-bit base too. Fault 5: stock rounds B to the base dtype first (4.5e-4 in bf16)."""
    model = adapted(kind, dtype)
    if kind in QUANTISED:
        assert len(adapted_layers(model)) == 7
        assert_exact(model, weight_of=lambda layer: quantised_models.dequantised(layer.get_base_layer()))
    else:
        assert len(adapted_layers(model)) == (4 if kind == "layers" else 6)
        assert_exact(model)
    for layer in adapted_layers(model).values():
        A, B = factors(layer)
        assert layer.lora_variant
        assert not A.any()
        assert B.dtype == torch.promote_types(dtype, torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_A" in name or "lora_embedding_A" in name), name
    if dtype.itemsize == 2 and kind == "layers":
        stock = bases(net(dtype, stock=True)).values()
        assert max((B.T @ B - torch.eye(4)).abs().max() for B in stock) > 1e-5  # the fault is real
        # fault 1 too: after PEFT's cast the embedding's B is trainable
        assert any(B.requires_grad for B in stock) == is_at_least("0.21")


def test_an_adapter_added_to_a_merged_model_has_the_b_of_the_weight_it_is_added_to():
    """PEFT unmerges the model as it adds one, but stock's B is that of the merged weight."""
    for stock in (False, True):
        model = randomise(net(stock=stock), scale=0.5)
        model.merge_adapter()
        with mica.fast.disabled() if stock else nullcontext(), pytest.warns(UserWarning, match="Unmerging"):
            second(model)
        for layer in adapted_layers(model).values():
            assert not layer.merged
            B = factors(layer, "second")[1].double()
            share = (B.T @ exact_basis(oriented(layer), 4)).square().sum().item() / 4
            assert share < 0.9 if stock else share > 1 - 1e-6  # the fault is real


MODES = [partial(torch.autocast, "cpu", torch.bfloat16), partial(torch.autocast, "cpu", torch.float16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [*MODES, torch.inference_mode])
@pytest.mark.parametrize("kind", ["layers", "qwen3_moe"])
def test_an_adapter_made_within_a_mode(kind, mode, dtype):
    """As outside of it. Some operations refuse the other 16-bit dtype in autocast, torch.stack for one; the
    solver's threads are in a mode of their own, and cannot write to what this thread made.
    """
    with mode():
        model = adapted(kind, dtype)
    assert_same_bases(model, adapted(kind, dtype))


@pytest.mark.parametrize("spelling", ["MICA", "Mica", "mIcA"])
def test_any_spelling_is_mica(spelling, tmp_path):
    """Fault 2: stock initialises by the SVD and then trains B as if it were LoRA."""
    model = net(init_lora_weights=spelling)
    assert mica.fast.explain(model).counts() == {"reference": 4}
    assert not any(B.requires_grad for B in bases(model).values())
    assert_same_bases(model, net())
    model.save_pretrained(tmp_path)
    assert '"init_lora_weights": "mica"' in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")  # PEFT counts no parameters
def test_rank_and_alpha_patterns_of_experts():
    model = wrap_experts(qwen3_moe(), rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 6})
    for layer in wrappers(model).values():
        is_down = layer.parameter_name == "down_proj"
        assert factors(layer)[1].shape[2] == (2 if is_down else 4)
        assert layer.scaling["default"] == (3 if is_down else 2)


def test_target_modules_and_parameters_in_one_solve(solved):
    model = wrap_experts(qwen3_moe(), target_modules=["q_proj"])
    assert len(solved) == 2 * (6 + 6 + 1)
    assert_exact(wrap_experts(qwen3_moe(), target_parameters=["self_attn.v_proj.weight"]))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_variant
    assert_frozen(model)


@pytest.mark.parametrize("kind", ["layers", "qwen3_moe"])
def test_plain_lora_is_left_alone(kind, solved):
    def made(**config):
        torch.manual_seed(0)
        return adapted(kind, torch.bfloat16, init_lora_weights=True, **config)

    expected = dict(made(stock=True).named_parameters())
    for name, parameter in made().named_parameters():
        assert torch.equal(parameter, expected[name])
        assert parameter.requires_grad == expected[name].requires_grad
    assert not solved


@of_layer_and_experts
def test_a_model_without_values_gets_factors_without_a_solution(build, targets, solved):
    with torch.device("meta"):
        model, too_narrow = build(), build()
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights="mica", **targets))
    assert not solved
    assert all(B.is_meta and not B.requires_grad for B in bases(adapted).values())
    with pytest.raises(UnsuitableLayerError, match="but got r=64"):
        get_peft_model(too_narrow, LoraConfig(r=64, init_lora_weights="mica", **targets))


def test_a_single_expert_or_a_stack_that_says_how_it_is_stored_is_not_refused():
    llama_4 = holder(torch.randn(3, 6, 16), "gate_up_proj", is_transposed=True)
    llama_4["experts"].down_proj = torch.nn.Parameter(torch.randn(3, 8, 6))
    assert_exact(wrap_experts(llama_4, 2, ["experts.gate_up_proj", "experts.down_proj"]))
    for experts in (1, 3):
        assert_exact(wrap_holder(holder(torch.randn(experts, 8, 12))))


# -- frozen -------------------------------------------------------------------------------------------


def test_b_stays_frozen_whatever_peft_does():
    model = wrap_experts(qwen3_moe().bfloat16())
    before = copy.deepcopy(model)
    second(model, r=2)
    assert len(wrappers(model)) == 4
    assert_same_bases(model, before)
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
    assert_exact(model, "second")


def test_low_level_injection_into_further_layers_leaves_the_first_ones_alone():
    model = Net()
    for target in ("up", "down"):
        inject_adapter_in_model(LoraConfig(r=4, init_lora_weights="mica", target_modules=[target]), model)
        if target == "up":
            expected = randomise(model).up.lora_A["default"].weight.clone()
    assert torch.equal(model.up.lora_A["default"].weight, expected)


@pytest.mark.parametrize("edited", [False, True])
@of_layer_and_experts
def test_low_level_injection_keeps_the_exact_basis_for_a_later_cast(build, targets, edited):
    """It is not put over another B."""
    config = LoraConfig(r=4, init_lora_weights="mica", **targets)
    model = inject_adapter_in_model(config, build().bfloat16())
    assert {B.dtype for B in bases(model).values()} == {torch.bfloat16}
    with torch.no_grad():
        for B in bases(model).values() if edited else ():
            B.fill_(0.25)
    cast_adapter_dtype(model, "default")
    assert not any(B.requires_grad for B in bases(model).values())
    assert {B.dtype for B in bases(model).values()} == {torch.float32}
    if edited:
        assert all((B == 0.25).all() for B in bases(model).values())
    else:
        assert_exact(model)
