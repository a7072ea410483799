import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from torch import nn

import mica.fast
from mica.errors import UnsuitableLayerError
from mica.fast.create.solving import NewAdapter
from mica.subspace import many
from tests.support.models import Net, adapted_layers, bases, net, randomise, snapshot, stock_load, wrap
from tests.support.peft_versions import is_at_least

INDICES = torch.tensor([[1, 2, 3, 28], [0, 7, 7, 3]])


def effective_weights(model):
    for name, layer in adapted_layers(model).items():
        yield name, NewAdapter(name, layer, "default").weight.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_b_spans_the_minor_subspace_and_a_is_zero(dtype):
    model = net(dtype)
    basis = bases(model)
    assert len(basis) == 4
    for name, weight in effective_weights(model):
        exact = torch.linalg.svd(weight, full_matrices=False).U[:, -4:]
        B = basis[name].detach().double()
        assert (exact - B @ (B.T @ exact)).norm() <= 1e-4, name  # the same subspace
        overlap = (exact * B).sum(0).abs()
        assert (overlap > 1 - 1e-6).all(), name  # and the same vectors in the same order
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name:
            assert not parameter.any()
            assert parameter.requires_grad
        else:
            assert not parameter.requires_grad, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_over_a_16_bit_base_are_orthonormal(dtype):
    """Fault 5: stock rounds B to the base dtype before the upcast (4.5e-4 in bf16)."""
    for B in bases(net(dtype)).values():
        assert B.dtype == torch.float32
        assert (B.T @ B - torch.eye(4)).abs().max() <= 1e-6
    stock = bases(net(dtype, stock=True)).values()
    assert max((B.T @ B - torch.eye(4)).abs().max() for B in stock) > 1e-5  # the fault is real


def test_an_adapter_added_to_a_merged_model_has_the_b_of_the_weight_it_is_added_to():
    """PEFT unmerges the model as it adds one, but stock's B is that of the merged weight."""
    shares = {}
    for stock in (False, True):
        model = randomise(net(stock=stock), scale=0.5)
        model.merge_adapter()
        with mica.fast.disabled() if stock else nullcontext(), pytest.warns(UserWarning, match="Unmerging"):
            model.add_adapter("second", model.peft_config["default"])
        assert not any(layer.merged for layer in adapted_layers(model).values())
        basis = bases(model, "second")
        for name, weight in effective_weights(model):
            exact = torch.linalg.svd(weight, full_matrices=False).U[:, -4:]
            shares[stock, name] = (basis[name].double().T @ exact).square().sum().item() / 4
    assert all(share > 1 - 1e-6 for (stock, _), share in shares.items() if not stock)
    assert all(share < 0.9 for (stock, _), share in shares.items() if stock)  # the fault is real


def test_exact_basis_is_not_put_over_another_b():
    model = inject_adapter_in_model(
        LoraConfig(r=4, init_lora_weights="mica", target_modules=["up"]), Net(torch.bfloat16)
    )
    assert model.up.lora_B["default"].weight.dtype == torch.bfloat16
    with torch.no_grad():
        model.up.lora_B["default"].weight.fill_(0.25)
    cast_adapter_dtype(model, "default")
    assert (model.up.lora_B["default"].weight == 0.25).all()
    assert model.up.lora_B["default"].weight.dtype == torch.float32


def test_low_level_injection_and_cast():
    model = inject_adapter_in_model(
        LoraConfig(r=4, init_lora_weights="mica", target_modules=["up"]), Net(torch.bfloat16)
    )
    cast_adapter_dtype(model, "default")
    B = model.up.lora_B["default"].weight
    assert (B.T @ B - torch.eye(4)).abs().max() <= 1e-6


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


# -- unsuitable layers -----------------------------------------------------------------------------


def _poison(model):
    with torch.no_grad():
        model.conv.weight[1, 2] = float("nan")
        model.conv.weight[1, 3] = float("inf")
    return model


def test_not_finite_names_the_layer_and_leaves_the_model_as_it_was():
    model = _poison(Net())
    before = snapshot(model)
    with pytest.raises(UnsuitableLayerError, match=r"layer 'conv' has 2 NaN or Inf of 320"):
        wrap(model)
    assert snapshot(model) == before
    assert not hasattr(model, "peft_config")


def test_rank_too_large_names_the_layer_and_leaves_the_model_as_it_was(solved):
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"MiCA requires `r` <= min.*r=11 for layer 'down'.*\(10, 16\)"):
        wrap(model, rank=11)
    assert snapshot(model) == before
    assert not solved  # detected before any work


def test_second_adapter_that_fails_leaves_the_first():
    model = randomise(net())
    out, before = model(INDICES), snapshot(model)
    config = copy.deepcopy(model.peft_config["default"])
    config.r = 11
    with pytest.raises(ValueError, match="layer 'down'"):
        model.add_adapter("second", config)
    assert snapshot(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(INDICES), out)


def test_a_failing_solver_leaves_the_model_as_it_was(monkeypatch):
    def failing(weight, rank, **kwargs):
        raise ValueError("no luck")

    monkeypatch.setattr(many, "solve_each", failing)
    model = Net()
    before = snapshot(model)
    with pytest.raises(UnsuitableLayerError, match=r"layer '(embed|up|conv|down)': no luck"):
        wrap(model)
    assert snapshot(model) == before


def test_skip_leaves_the_layer_out_and_says_so(tmp_path):
    mica.fast.enable(on_unsuitable="skip")
    with pytest.warns(UserWarning, match=r"layer 'conv' has 2 NaN.*left without an adapter"):
        model = wrap(_poison(Net()))
    assert [name.rsplit(".", 1)[1] for name in adapted_layers(model)] == ["embed", "up", "down"]
    assert not any("conv" in name for name in model.base_model.targeted_module_names)
    assert not any(p.requires_grad for p in model.base_model.model.conv.parameters())
    assert model.peft_config["default"].exclude_modules == {"conv"}
    # what was saved loads again, with the backend and without
    randomise(model).save_pretrained(tmp_path)
    for loaded in (PeftModel.from_pretrained(_poison(Net()), tmp_path), stock_load(_poison(Net()), tmp_path)):
        assert len(adapted_layers(loaded)) == 3


@pytest.mark.parametrize("exclude", [None, ["up"], "u.*p"])
def test_skip_keeps_the_user_s_exclusions(exclude):
    mica.fast.enable(on_unsuitable="skip")
    with pytest.warns(UserWarning, match="layer 'conv'"):
        model = wrap(_poison(Net()), exclude_modules=exclude)
    expected = ["embed", "up", "down"] if exclude is None else ["embed", "down"]
    assert [name.rsplit(".", 1)[1] for name in adapted_layers(model)] == expected
    again = wrap(_poison(Net()), exclude_modules=model.peft_config["default"].exclude_modules)
    assert len(adapted_layers(again)) == len(expected)


def test_skip_of_a_second_adapter_keeps_the_first_on_that_layer():
    mica.fast.enable(on_unsuitable="skip")
    model = net()
    config = copy.deepcopy(model.peft_config["default"])
    config.r = 11
    with pytest.warns(UserWarning, match="layer 'down'"):
        model.add_adapter("second", config)
    assert set(model.base_model.model.down.lora_A) == {"default"}
    assert set(model.base_model.model.up.lora_A) == {"default", "second"}


def test_nothing_suitable_is_an_error():
    mica.fast.enable(on_unsuitable="skip")
    model = Net()
    before = snapshot(model)
    refused = pytest.raises(UnsuitableLayerError, match="none of the 4 target modules")
    with pytest.warns(UserWarning, match="left without an adapter"), refused:
        wrap(model, rank=64)
    assert snapshot(model) == before


def test_integer_weights_are_refused_as_in_stock():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"Please initialize MiCA under .*layer '0' has a weight of dtype torch.int8"
    ):
        wrap(model, targets=["0"], rank=2)


def test_plain_lora_is_left_alone(solved):
    expected = dict(net(torch.bfloat16, init_lora_weights=True, stock=True).named_parameters())
    for name, parameter in net(torch.bfloat16, init_lora_weights=True).named_parameters():
        assert torch.equal(parameter, expected[name])
        assert parameter.requires_grad == expected[name].requires_grad
    assert not solved


def test_meta_models_are_left_to_stock(solved):
    with torch.device("meta"):
        model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(
            model, LoraConfig(r=4, init_lora_weights="mica", target_modules=["up"]), low_cpu_mem_usage=True
        )
    assert not solved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_an_adapter_made_within_autocast(dtype, autocast):
    """As outside of it. Some operations refuse the other 16-bit dtype there, torch.stack for one."""
    expected = bases(net(dtype))
    with torch.autocast("cpu", autocast):
        model = net(dtype)
    assert all(torch.equal(B, expected[name]) for name, B in bases(model).items())
