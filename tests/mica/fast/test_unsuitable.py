"""Layers, experts and quantised layers that MiCA cannot start from: said clearly, and nothing has changed."""

import pytest
import torch
from peft import PeftModel
from torch import nn

import mica.fast
from mica.errors import UnsuitableLayerError
from mica.subspace import many
from tests.support import quantised_models
from tests.support.models import (
    Net,
    adapted_layers,
    factors,
    net,
    oriented,
    randomise,
    stock_load,
    wrap,
)
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
from tests.support.unchanged import unchanged

pytestmark = pytest.mark.usefixtures("one_thread", "gptqmodel")
INDICES = torch.tensor([[1, 2, 3, 28], [0, 7, 7, 3]])
DOWN = {"target_parameters": ["experts.down_proj"], "rank": 2}


def refused(model, match, error=UnsuitableLayerError, wrap=wrap, **config):
    with unchanged(model), pytest.raises(error, match=match):
        wrap(model, **config)
    assert not hasattr(model, "peft_config")


def poisoned_net():
    model = Net()
    with torch.no_grad():
        model.conv.weight[1, 2] = float("nan")
        model.conv.weight[1, 3] = float("inf")
    return model


def poisoned_experts(*experts):
    model = qwen3_moe()
    with torch.no_grad():
        for expert in experts or (3,):
            model.model.layers[1].mlp.experts.down_proj[expert, 1, 2:4] = float("nan")
    return model


def poisoned_hqq():
    model = quantised_models.llama("hqq")
    model.model.layers[0].mlp.up_proj.meta["scale"][0] = float("nan")
    return model


def quantised(kind):
    return lambda: quantised_models.llama(kind)


ON_EXPERTS = {"wrap": wrap_experts}
ON_QUANTISED = {"targets": quantised_models.TARGETS}
DOWN_1 = "'model.layers.1.mlp.experts.down_proj'"
TOO_LARGE = r"MiCA requires `r` <= min.*r=11 for layer 'down'.*\(10, 16\)"
CASES = [  # what builds the model, options, message
    (poisoned_net, {}, r"layer 'conv' has 2 NaN or Inf of 320"),
    (poisoned_experts, ON_EXPERTS, rf"{DOWN_1} has 2 NaN or Inf of 4608, in expert 3\.$"),
    (lambda: poisoned_experts(3, 5), ON_EXPERTS, r"has 4 NaN or Inf of 4608, in experts 3, 5\.$"),
    (poisoned_hqq, ON_QUANTISED, r"layer '.*mlp.up_proj' has 8 NaN or Inf of 1536"),
    (Net, {"rank": 11}, TOO_LARGE),
    (
        qwen3_moe,
        {**ON_EXPERTS, "rank": 25},
        r"r=25 for layer 'model.layers.0.mlp.experts.down_proj' .*\(6, 32, 24\) \(max usable r is 24\)",
    ),
]
CASES += [
    (
        quantised(kind),
        {**ON_QUANTISED, "rank": 17},
        r"r=17 for layer '.*k_proj' with weight shape \(16, 32\)",
    )
    for kind in ("nf4 double, bf16 storage", "int8", "hqq", "torchao int8", "gptq stub")
]


@pytest.mark.parametrize(("build", "options", "message"), CASES)
def test_a_weight_or_rank_is_refused_before_any_work(build, options, message, solved):
    error = ValueError if message == TOO_LARGE else UnsuitableLayerError
    refused(build(), message, error, **options)
    assert not solved


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
    refused(model, match, error, rank=rank, **ON_EXPERTS, target_parameters=["experts.gate_up_proj"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_packed_experts_are_refused(dtype):
    what = rf"'experts.down_proj' has a weight of dtype {dtype}. Experts in 8 or 4 bits .* dequantised"
    refused(holder(torch.zeros(3, 8, 12).to(dtype)), what, TypeError, **ON_EXPERTS, **DOWN)


def test_integer_weights_are_refused_as_in_stock():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    what = r"Please initialize MiCA under .*layer '0' has a weight of dtype torch.int8"
    refused(model, what, TypeError, targets=["0"], rank=2)


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({"_is_expert_parallel": True}, "holds the experts of one process only"),
        ({"_hf_tp_plan": "grouped_gemm"}, "holds one shard of it"),
    ],
)
def test_a_part_of_the_experts_is_refused(attributes, match):
    model = holder(torch.randn(3, 8, 12), **attributes)
    refused(model, f"'experts.down_proj' {match}", **ON_EXPERTS, **DOWN)


def test_a_shard_of_a_layer_is_refused():
    model = Net()
    model.up._hf_tp_plan = "colwise"
    refused(model, r"whole weight, but layer 'up' holds one shard of it", targets=["up"])


def test_experts_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = holder(torch.randn(3, 8, 12))
    refused(model, "'experts.down_proj' is on the meta device", **ON_EXPERTS, **DOWN)


def test_a_single_expert():
    weight = torch.randn(1, 8, 12)
    (layer,) = wrappers(wrap_holder(holder(weight))).values()
    assert_same_vectors(factors(layer)[1], exact_basis(weight, 2))
    model = holder(weight, is_transposed=True)
    refused(model, r"single expert of shape \(1, 8, 12\) stored as", **ON_EXPERTS, **DOWN)


def test_experts_that_do_not_say_that_they_are_transposed():
    """Llama 4's. PEFT would take B for the side of the inputs."""
    model = holder(torch.randn(3, 6, 16), "gate_up_proj")
    model["experts"].down_proj = nn.Parameter(torch.randn(3, 8, 6))
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank": 2}
    what = r"'experts.gate_up_proj', because .* their Stack has no attribute `is_transposed`"
    refused(model, what, **ON_EXPERTS, **options)
    model["experts"].is_transposed = True
    for layer in wrappers(wrap_experts(model, **options)).values():
        assert_same_vectors(factors(layer)[1], exact_basis(oriented(layer), 2))


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_peft_refuses_of_lora_it_refuses_of_mica(option):
    """With its own words; DoRA it refuses in combination with MiCA already."""
    with pytest.raises(ValueError, match=f"{next(iter(option))}|DoRA"):
        wrap_experts(qwen3_moe(), **option)


# ---------------------------------------------------------------------------------------------------
# in the solver, and a second adapter
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (Net, {}, r"layer '(embed|up|conv|down)': no luck"),
        (
            qwen3_moe,
            ON_EXPERTS,
            r"layer 'model.layers.\d.mlp.experts.\w+' expert \d: no luck",
        ),
    ],
)
def test_a_failing_solver_leaves_the_model_as_it_was(monkeypatch, build, options, message):
    def failing(weight, rank, **kwargs):
        raise ValueError("no luck")

    monkeypatch.setattr(many, "solve_each", failing)
    refused(build(), message, **options)


def logits_of(model):
    return model(input_ids=tokens()).logits


@pytest.mark.parametrize(
    ("build", "rank", "layer", "output"),
    [
        (net, 11, "layer 'down'", lambda model: model(INDICES)),
        (lambda: wrap_experts(qwen3_moe()), 25, "layer 'model.layers.0.mlp.experts", logits_of),
        (lambda: wrap_experts(qwen3_moe()), 5, "layer 'model.layers.0.mlp.experts", logits_of),
        (lambda: quantised_models.adapted("nf4"), 17, "r=17", quantised_models.logits),
    ],
)
def test_a_second_adapter_that_fails_leaves_the_first(build, rank, layer, output, monkeypatch):
    """In the check, or (with 5) in the solver when all wrappers have the new adapter."""
    model, solver = randomise(build()), many.solve_each
    expected = output(model)
    monkeypatch.setattr(
        many, "solve_each", lambda weight, rank, **_: solver(weight, 99 if rank == 5 else rank)
    )
    with unchanged(model), pytest.raises(UnsuitableLayerError, match=layer):
        second(model, r=rank)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model), expected)


# ---------------------------------------------------------------------------------------------------
# skipped
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def skipping():
    mica.fast.enable(on_unsuitable="skip")


def adapted_names(model):
    return [name.rsplit(".", 1)[1] for name in adapted_layers(model)]


@pytest.mark.usefixtures("skipping")
def test_skip_leaves_the_layer_out_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"layer 'conv' has 2 NaN.*left without an adapter"):
        model = wrap(poisoned_net())
    assert adapted_names(model) == ["embed", "up", "down"]
    assert not any("conv" in name for name in model.base_model.targeted_module_names)
    assert not any(p.requires_grad for p in model.base_model.model.conv.parameters())
    assert model.peft_config["default"].exclude_modules == {"conv"}
    # what was saved loads again, with the backend and without
    randomise(model).save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, stock_load):
        assert len(adapted_layers(load(poisoned_net(), tmp_path))) == 3


@pytest.mark.usefixtures("skipping")
def test_skip_of_a_quantised_layer():
    with pytest.warns(UserWarning, match="up_proj.*left without an adapter"):
        model = wrap(poisoned_hqq(), **ON_QUANTISED)
    assert len(adapted_layers(model)) == 6


@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize("exclude", [None, ["up"], "u.*p"])
def test_skip_keeps_the_user_s_exclusions(exclude):
    with pytest.warns(UserWarning, match="layer 'conv'"):
        model = wrap(poisoned_net(), exclude_modules=exclude)
    expected = ["embed", "up", "down"] if exclude is None else ["embed", "down"]
    assert adapted_names(model) == expected
    again = wrap(poisoned_net(), exclude_modules=model.peft_config["default"].exclude_modules)
    assert len(adapted_layers(again)) == len(expected)


@pytest.mark.usefixtures("skipping")
def test_skip_of_a_second_adapter_keeps_the_first_on_that_layer():
    with pytest.warns(UserWarning, match="layer 'down'"):
        model = second(net(), r=11)
    assert set(model.base_model.model.down.lora_A) == {"default"}
    assert set(model.base_model.model.up.lora_A) == {"default", "second"}


@pytest.mark.usefixtures("skipping")
def test_skip_leaves_a_parameter_out_and_says_so():
    with pytest.warns(UserWarning, match=r"experts.down_proj' has 2 NaN .* left without an adapter"):
        model = wrap_experts(poisoned_experts())
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
    again = wrap_experts(poisoned_experts(), stock=True, target_parameters=targeted)
    assert wrappers(again).keys() == wrappers(model).keys()
    with pytest.raises(UnsuitableLayerError, match=r"r=25 .*A further adapter cannot skip it"):
        second(model, r=25)
    assert list(model.peft_config) == ["default"]


@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize(
    ("build", "options", "what"), [(Net, {}, "modules"), (qwen3_moe, ON_EXPERTS, "parameters")]
)
def test_nothing_suitable_is_an_error(build, options, what):
    with pytest.warns(UserWarning, match="left without an adapter"):
        refused(build(), f"none of the 4 target {what}", rank=64, **options)
