"""New adapters of layers and of experts: every basis against an fp64 SVD, in its order, and frozen."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import cast_adapter_dtype

import mica.fast
from tests.support.models import (
    Net,
    adapted_layers,
    bases,
    factors,
    net,
    oriented,
    randomise,
    stored,
    wrap,
)
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
from tests.support.peft_versions import is_at_least

INDICES = torch.tensor([[1, 2, 3, 28], [0, 7, 7, 3]])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["layers", *BUILDERS]
LAYER, EXPERTS = {"target_modules": ["up"]}, {"target_modules": [], "target_parameters": STACKS}


def adapted(kind="layers", dtype=torch.float32, **config):
    """An adapted net of one layer of each kind, or a language model with all stacks and routers adapted."""
    if kind == "layers":
        return net(dtype, **config)
    targets = {"target_parameters": [*STACKS, ROUTER[kind]]}
    return wrap_experts(BUILDERS[kind]().to(dtype), **{**targets, **config})


def assert_exact(model, adapter="default"):
    """Each B is its weight's minor subspace, orthonormal: the same vectors in the same order."""
    for layer in adapted_layers(model).values():
        B = factors(layer, adapter)[1].detach()
        rank = B.shape[-1]
        exact, double = exact_basis(oriented(layer), rank), B.double()
        assert (exact - double @ (double.mT @ exact)).norm(dim=(-2, -1)).max() <= 1e-4
        assert_same_vectors(B, exact)
        assert (B.mT @ B - torch.eye(rank)).abs().max() <= 1e-6


def assert_frozen(model, adapter="default", trained=True):
    for name, layer in wrappers(model).items():
        assert not layer.lora_B[adapter].weight.requires_grad, name
        assert layer.lora_A[adapter].weight.requires_grad == trained, name
        assert not stored(layer).requires_grad


# ---------------------------------------------------------------------------------------------------
# bases
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_b_spans_the_minor_subspace_and_a_is_zero(kind, dtype):
    """Exact over a 16-bit base too. Fault 5: stock rounds B to the base dtype first (4.5e-4 in bf16)."""
    model = adapted(kind, dtype)
    assert len(adapted_layers(model)) == (4 if kind == "layers" else 6)
    assert_exact(model)
    for layer in adapted_layers(model).values():
        A, B = factors(layer)
        assert not A.any()
        assert B.dtype == torch.promote_types(dtype, torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_A" in name or "lora_embedding_A" in name), name
    if dtype.itemsize == 2 and kind == "layers":
        stock = bases(net(dtype, stock=True)).values()
        assert max((B.T @ B - torch.eye(4)).abs().max() for B in stock) > 1e-5  # the fault is real


def test_the_output_is_unchanged_and_only_a_is_trained():
    model = qwen3_moe()
    expected = model(input_ids=tokens()).logits
    model = wrap_experts(model).train()
    before = {name: B.clone() for name, B in bases(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected)
    for _ in range(2):
        model(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in adapted_layers(model).items():
        assert torch.equal(bases(model)[name], before[name])
        assert factors(layer)[0].any()


def test_an_adapter_added_to_a_merged_model_has_the_b_of_the_weight_it_is_added_to():
    """PEFT unmerges the model as it adds one, but stock's B is that of the merged weight."""
    for stock in (False, True):
        model = randomise(net(stock=stock), scale=0.5)
        model.merge_adapter()
        with mica.fast.disabled() if stock else nullcontext(), pytest.warns(UserWarning, match="Unmerging"):
            model.add_adapter("second", model.peft_config["default"])
        for layer in adapted_layers(model).values():
            assert not layer.merged
            B = factors(layer, "second")[1].double()
            share = (B.T @ exact_basis(oriented(layer), 4)).square().sum().item() / 4
            assert share < 0.9 if stock else share > 1 - 1e-6  # the fault is real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_an_adapter_made_within_autocast(dtype, autocast):
    """As outside of it. Some operations refuse the other 16-bit dtype there, torch.stack for one."""
    expected = bases(net(dtype))
    with torch.autocast("cpu", autocast):
        model = net(dtype)
    assert all(torch.equal(B, expected[name]) for name, B in bases(model).items())


@pytest.mark.parametrize("stock", [False, True])
def test_a_base_made_in_inference_mode_and_cast_outside_it(stock):
    """`nn.Module.to` then leaves weights whose ``detach`` refuses views. Such a model works in forwards."""
    torch.manual_seed(0)
    with torch.inference_mode():
        base = Net(torch.bfloat16)
    torch.manual_seed(0)
    plain = Net(torch.bfloat16).float()
    expected = bases(wrap(plain, targets=["up", "down"], stock=stock))
    for name, B in bases(wrap(base.float(), targets=["up", "down"], stock=stock)).items():
        assert torch.equal(B, expected[name])


def test_inference_mode():
    """The solver's threads have their own mode, and cannot write to what this thread made."""
    expected = bases(wrap_experts(qwen3_moe()))
    with torch.inference_mode():
        model = wrap_experts(qwen3_moe())
    assert all(torch.equal(B, expected[name]) for name, B in bases(model).items())


@pytest.mark.parametrize("spelling", ["MICA", "Mica", "mIcA"])
def test_any_spelling_is_mica(spelling, tmp_path):
    """Fault 2: stock initialises by the SVD and then trains B as if it were LoRA."""
    model = net(init_lora_weights=spelling)
    assert mica.fast.explain(model).counts() == {"reference": 4}
    assert not any(B.requires_grad for B in bases(model).values())
    for name, B in bases(net()).items():
        assert torch.equal(B, bases(model)[name])
    model.save_pretrained(tmp_path)
    assert '"init_lora_weights": "mica"' in (tmp_path / "adapter_config.json").read_text()


def test_same_random_state_as_stock():
    """PEFT draws random numbers for A and B before MiCA replaces them: later draws must not move."""
    net()
    ours = torch.rand(3)
    net(stock=True)
    assert torch.equal(ours, torch.rand(3))


def test_rank_and_alpha_patterns(solved):
    model = net(rank_pattern={"up": 2}, alpha_pattern={"up": 6}, use_rslora=True)
    layer = model.base_model.model.up
    assert layer.lora_B["default"].weight.shape == (20, 2)
    assert layer.scaling["default"] == pytest.approx(6 / 2**0.5)
    assert sorted(solved) == [(10, 16), (12, 29), (16, 20), (20, 12)]


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
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_variant
    assert_frozen(model)


def test_the_weight_of_a_linear_layer_as_a_parameter():
    assert_exact(wrap_experts(qwen3_moe(), target_parameters=["self_attn.v_proj.weight"]))


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


@pytest.mark.parametrize(("device", "build", "targets"), [("meta", Net, LAYER), ("cpu", qwen3_moe, EXPERTS)])
def test_low_cpu_mem_usage_without_a_file_leaves_the_adapter_on_the_meta_device(
    device, build, targets, solved
):
    with torch.device(device):
        model = build()
    config = LoraConfig(r=4, init_lora_weights="mica", **targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
    assert not solved
    assert all(B.is_meta for B in bases(model).values())


# ---------------------------------------------------------------------------------------------------
# halves of gate and up
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
def test_halves_are_the_minor_subspaces_of_gate_and_up(kind):
    mica.fast.enable(gate_up="halves")
    for layer in wrappers(wrap_experts(BUILDERS[kind]().bfloat16())).values():
        B, weight = factors(layer)[1], oriented(layer)
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
        assert (factors(layer)[1].abs().amax(1) > 0).all()
    with pytest.raises(ValueError, match=r"^gate_up must be one of \('fused', 'halves'\), but it is 'both'"):
        mica.fast.enable(gate_up="both")


def test_halves_of_other_parameters_are_not_taken():
    mica.fast.enable(gate_up="halves")
    assert_exact(wrap_holder(holder(torch.randn(3, 8, 12))))


# ---------------------------------------------------------------------------------------------------
# frozen
# ---------------------------------------------------------------------------------------------------


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
    assert_exact(model, "second")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_b_of_a_16_bit_embedding_stays_frozen(dtype):
    """Fault 1: after PEFT's cast B is trainable, and moves."""
    model = net(dtype, targets=["embed", "up"])
    before = {name: B.clone() for name, B in bases(model).items()}
    assert not any(B.requires_grad for B in bases(model).values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        model(INDICES).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, B in bases(model).items():
        assert torch.equal(B, before[name])
    assert any(p.any() for name, p in model.named_parameters() if "lora_embedding_A" in name)
    stock = net(dtype, targets=["embed"], stock=True)
    assert any(B.requires_grad for B in bases(stock).values()) == is_at_least("0.21")  # the fault is real


def test_an_embedding_loaded_for_inference_is_not_trainable(tmp_path):
    randomise(net(torch.bfloat16, targets=["embed"])).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(torch.bfloat16), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize(("build", "targets"), [(Net, LAYER), (qwen3_moe, EXPERTS)])
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


def test_a_second_adapter_gets_bases_of_its_own():
    model = wrap_experts(qwen3_moe())
    first = {name: B.clone() for name, B in bases(model).items()}
    second(model, r=2)
    assert len(wrappers(model)) == 4
    assert_exact(model, "second")
    for name, B in bases(model).items():
        assert torch.equal(B, first[name])
