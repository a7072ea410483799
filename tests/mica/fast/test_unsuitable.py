"""Layers, experts and quantised layers that MiCA cannot start from: said clearly, and nothing has changed."""

import re
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

import mica.fast
from mica.errors import UnsuitableLayerError
from mica.subspace import many
from tests.support import quantised_models
from tests.support.models import INDICES, Net, adapted_layers, net, randomise, tiny_llama, wrap
from tests.support.moe_models import holder, qwen3_moe, second, tokens, wrap_experts, wrappers
from tests.support.peft_versions import needs_peft
from tests.support.quantised_models import bnb_4bit, bnb_8bit
from tests.support.stock import counted
from tests.support.tolerances import RELATIVE, error
from tests.support.unchanged import unchanged

DOWN = {"wrap": wrap_experts, "target_parameters": ["experts.down_proj"], "rank": 2}
BOTH = {**DOWN, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
EXPERTS, QUANTISED = {"wrap": wrap_experts}, {"targets": quantised_models.TARGETS}
FIRST = {"targets": ["0"], "rank": 2}
of_layers_and_experts = pytest.mark.parametrize(("build", "options"), [(Net, {}), (qwen3_moe, EXPERTS)])


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


def poisoned_experts():
    model = qwen3_moe()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 1, 2:4] = float("nan")
    return model


def poisoned_hqq():
    model = quantised_models.llama("hqq")
    model.model.layers[0].mlp.up_proj.meta["scale"][0] = float("nan")
    return model


def stack(*shape, name="down_proj", dtype=torch.float32, **attributes):
    return holder(torch.randn(shape or (3, 8, 12)).to(dtype), name, **attributes)


def llama_4():
    """PEFT would take B for the side of the inputs."""
    model = stack(3, 6, 16, name="gate_up_proj")
    model["experts"].down_proj = nn.Parameter(torch.randn(3, 8, 6))
    return model


def of_integers():
    model = nn.Sequential(nn.Linear(32, 64))
    model[0].weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    return model


def shard():
    model = Net()
    model.up._hf_tp_plan = "grouped_gemm"
    return model


def without_weights():
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    return model


def nf4():
    return quantised_models.llama("nf4")


def bnb_later(bits, **options):
    """Layers that quantise on their way to a device."""
    import bitsandbytes as bnb

    kind = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    model = nn.Sequential(kind(32, 16, **options))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


MOE_DOWN = "model.layers.%d.mlp.experts.down_proj"
MOE_RANK = rf"r=25 for layer '{MOE_DOWN % 0}' expert 0 .*\(32, 24\) \(max usable r is 24\)\."
PACKED = "'experts.down_proj' has a weight of dtype {}. Experts in 8 or 4 bits .* dequantised"
DOWNS, GATES = "'experts.down_proj'", "layer 'experts.gate_up_proj'"
NO_FLAG = r"'experts.\w+', because .* their Stack has no attribute `is_transposed`"
LATER = r"but layer '0' \(.* .-bit\) is not quantised yet"
CASES = {  # what it is: (what builds the model, options, message, other error)
    "NaN": (poisoned_net, {}, r"from layer 'conv': weight must be finite, but got 2 NaN or infinite of 320"),
    "NaN, expert": (
        poisoned_experts,
        EXPERTS,
        rf"from layer '{MOE_DOWN % 1}' expert 3: .* got 2 NaN or infinite of 768 entries\. ",
    ),
    "NaN, HQQ": (poisoned_hqq, QUANTISED, r"layer '.*mlp.up_proj': .* got 8 NaN or infinite of 1536"),
    "rank": (
        Net,
        {"rank": 11},
        r"MiCA requires `r` <= .* r=11 for layer 'down' .* \(10, 16\) \(max usable r is 10\)",
        ValueError,
    ),
    "rank, experts": (qwen3_moe, {**EXPERTS, "rank": 25}, MOE_RANK),
    "ep": (lambda: stack(_is_expert_parallel=True), DOWN, f"{DOWNS} holds the experts of one process only"),
    "tp": (lambda: stack(_hf_tp_plan="grouped_gemm"), DOWN, f"{DOWNS} holds one shard of it"),
    "shard": (shard, {"targets": ["up"]}, "whole weight, but layer 'up' holds one shard of it"),
    "meta": (without_weights, {"targets": "all-linear"}, "model.layers.1.mlp.up_proj' is on the meta device"),
    "one": (lambda: stack(1, 8, 12, is_transposed=True), DOWN, r"expert of shape \(1, 8, 12\) stored as"),
    "Llama 4": (llama_4, BOTH, NO_FLAG),
    "4 bits later": (lambda: bnb_later(4), FIRST, LATER),
    "8 bits later": (lambda: bnb_later(8, has_fp16_weights=False), FIRST, LATER),
}
for _kind in ("nf4 double, bf16 storage", "int8", "hqq", "torchao int8"):
    _message = r"r=17 for layer '.*k_proj' .*\(16, 32\) \(max usable r is 16\)"
    CASES[f"rank, {_kind}"] = partial(quantised_models.llama, _kind), {**QUANTISED, "rank": 17}, _message
for _dtype in (torch.float8_e4m3fn, torch.uint8):  # of experts
    CASES[f"{_dtype}"] = partial(stack, dtype=_dtype), DOWN, PACKED.format(_dtype), TypeError
CASES["int8"] = (  # as in stock
    of_integers,
    FIRST,
    "Please initialize MiCA under .*layer '0' has a weight of dtype torch.int8",
    TypeError,
)


PARALLEL = needs_peft("0.21", "it imports for split layers what transformers 5.20 and later do not have")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=PARALLEL if case in ("tp", "shard") else ()) for case in CASES]
)
def test_a_model_is_refused_before_any_work(case, solved):
    build, options, message, *other = CASES[case]
    refused(build(), message, *other, **options)
    assert not solved


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_peft_refuses_of_lora_it_refuses_of_mica(option):
    """With its own words; DoRA it refuses in combination with MiCA already."""
    with pytest.raises(ValueError, match=f"{next(iter(option))}|DoRA"):
        wrap_experts(qwen3_moe(), **option)


# -- quantised ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (bnb_4bit, "is_loaded_in_4bit"),
        (partial(bnb_4bit, quant_storage=torch.bfloat16), "is_loaded_in_4bit"),  # r = 1 fits the packed bytes
        (bnb_8bit, "is_loaded_in_8bit"),
    ],
)
def test_a_model_that_does_not_say_that_it_is_quantised(make, flag, tmp_path):
    """PEFT takes its layers for plain ones; an adapter from a file runs there all the same."""
    model, options = nn.Sequential(make(nn.Linear(32, 16))), {"rank": 1, "targets": ["0"]}
    refused(model, r"layer '0' is a Linear\w+ of bitsandbytes, .*: set model.is_loaded_in_4bit", **options)
    setattr(model, flag, True)
    adapter = randomise(wrap(model, **options))
    adapter.save_pretrained(tmp_path)
    x = torch.randn(3, 32, requires_grad=True)
    expected = adapter(x)
    delattr(adapter.unload(), flag)
    loaded = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    assert type(loaded.base_model.model[0]) is lora.Linear
    assert error(loaded(x), expected) <= RELATIVE[torch.float32]


class QuantizedLinear(nn.Module):
    """As AQLM's and gptqmodel's: no weight, codes instead."""

    in_features, out_features = 32, 16

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
        self.codebooks = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x.new_ones(*x.shape[:-1], 16)


def config_of(wrapper, init):
    """PEFT wraps the layer without its library."""
    config = LoraConfig(r=4, init_lora_weights=init, target_modules=["0"])
    config._register_custom_module({QuantizedLinear: wrapper})
    return config


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("wrapper", [AqlmLoraLinear, GPTQLoraLinear, AwqLoraLinear])
def test_a_library_that_is_not_covered_is_named(wrapper, existing):
    model = nn.Sequential(QuantizedLinear())
    config = partial(config_of, wrapper)
    attempt = partial(get_peft_model, model)
    if existing:
        model = get_peft_model(model, config(True))
        attempt = partial(model.add_adapter, "second")
    message = r"'0' is a QuantizedLinear, and .* among quantised ones for those of bitsandbytes"
    with unchanged(model), pytest.raises(UnsuitableLayerError, match=message):
        attempt(config("mica"))


@pytest.mark.parametrize("wrapper", [GPTQLoraLinear, AwqLoraLinear])
def test_plain_lora_over_a_library_that_is_not_covered_is_peft_s(wrapper):
    mica.fast.enable(lora=True)
    model = randomise(get_peft_model(nn.Sequential(QuantizedLinear()), config_of(wrapper, True)))
    x = torch.randn(3, 32)
    out, counts = counted(lambda: model(x))
    with mica.fast.disabled():
        assert torch.equal(out, model(x))
    assert not counts
    (row,) = mica.fast.explain(model).rows
    assert (row.path, row.calls) == ("peft", None)
    assert row.reason == f"layers of type {wrapper.__module__}.{wrapper.__name__} are not covered"


def logits(model):
    return model(input_ids=tokens()).logits


# -- in the solver, and a second adapter -------------------------------------------------------------


def fail(monkeypatch):
    """The solver does, with "no luck"."""
    monkeypatch.setattr(many, "solve_stack", Mock(side_effect=ArithmeticError("no luck")))


@of_layers_and_experts
def test_a_failing_solver_leaves_the_model_as_it_was(monkeypatch, build, options):
    fail(monkeypatch)
    refused(build(), "of layer '.*'.* could not be computed: no luck", RuntimeError, **options)


@pytest.mark.parametrize(
    ("build", "rank", "layer", "output"),
    [
        (net, 11, "layer 'down'", lambda model: model(INDICES)),
        (lambda: wrap_experts(qwen3_moe()), 25, "layer 'model.layers.0.mlp.experts", logits),
        (lambda: wrap_experts(qwen3_moe()), 5, "no luck", logits),
        (partial(quantised_models.adapted, "nf4"), 17, "but got r=17", quantised_models.logits),
    ],
)
def test_a_second_adapter_that_fails_leaves_the_first(build, rank, layer, output, monkeypatch):
    """In the check, or (with 5) in the solver when all wrappers have the new adapter."""
    model = randomise(build())
    expected = output(model)
    if rank == 5:
        fail(monkeypatch)
    with unchanged(model), pytest.raises((UnsuitableLayerError, RuntimeError), match=layer):
        second(model, r=rank)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model), expected)


def test_a_second_adapter_that_fails_on_other_layers_leaves_no_record_of_them(monkeypatch):
    model = wrap(Net(), targets=["up"])
    fail(monkeypatch)
    with pytest.raises(RuntimeError, match="no luck"):
        second(model, target_modules=["conv", "down"])
    assert model.base_model.targeted_module_names == ["up"]


# -- what the error says to leave out -----------------------------------------------------------------


class WithConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.patches(x).mean((-1, -2)))


@pytest.mark.parametrize(
    ("build", "options", "unsuitable"),
    [
        (poisoned_net, {"rank": 11}, ["conv", "down"]),  # for two reasons
        (WithConv, {"targets": ["patches", "head"]}, ["patches"]),
        (poisoned_hqq, QUANTISED, ["model.layers.0.mlp.up_proj"]),
    ],
)
def test_exclude_modules_leaves_out_what_the_error_names(build, options, unsuitable, tmp_path):
    advice = re.escape(f" To adapt all other layers, add {unsuitable} to exclude_modules of the LoraConfig.")
    refused(build(), rf"layer '{unsuitable[0]}'[^\[]*\.{advice}$", **options)
    model = wrap(build(), exclude_modules=unsuitable, **options)
    assert not {f"base_model.model.{name}" for name in unsuitable} & adapted_layers(model).keys()
    randomise(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert adapted_layers(loaded).keys() == adapted_layers(model).keys() != set()


def test_target_parameters_leave_out_what_the_error_names():
    unsuitable = MOE_DOWN % 1
    advice = re.escape(f" To adapt all others, leave {[unsuitable]} out of target_parameters.")
    refused(
        poisoned_experts(),
        rf"{unsuitable}' expert 3: .* 2 NaN or infinite of 768 entries\.{advice}$",
        **EXPERTS,
    )
    names = [MOE_DOWN % 0, *(f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(2))]
    assert len(wrappers(wrap_experts(poisoned_experts(), target_parameters=names))) == 3


@of_layers_and_experts
def test_nothing_is_left_out_where_nothing_is_suitable(build, options):
    refused(build(), r"but got r=64 .*\)\.$", rank=64, **options)


# -- layers and variants for which PEFT has no MiCA -------------------------------------------------


def test_a_convolution_is_named():
    """Stock: "Invalid or unsupported variant combination: ('mica',)"."""
    message = "layer 'patches' is a Conv2d, and MiCA is for embeddings and linear layers only"
    refused(WithConv(), message, targets=["patches", "head"])


@pytest.mark.parametrize(
    ("build", "target"),
    [(Net, "up"), (Net, "embed"), (WithConv, "patches"), (tiny_llama, "q_proj"), (nf4, "q_proj")],
)
@pytest.mark.parametrize("option", [{"use_dora": True}, {"alora_invocation_tokens": [1, 2]}])
def test_another_variant_is_refused_and_named(build, target, option):
    message = rf"MiCA cannot be combined with another variant.*asks for {next(iter(option))}\.$"
    refused(build(), message, ValueError, targets=[target], **option)
