"""A saved MiCA adapter of experts: stock PEFT loads it as it is, and with this package it is MiCA again."""

import json

import peft
import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

import mica.fast
from tests.support.models import factors, randomise, stock_load
from tests.support.moe_models import (
    BUILDERS,
    ROUTER,
    STACKS,
    qwen3_moe,
    tokens,
    wrap_experts,
    wrappers,
)
from tests.support.tolerances import RELATIVE, error
from tests.support.without_mica import logits_without_mica

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(kind="qwen3_moe", base=None, **config):
    model = base or BUILDERS[kind]()
    return randomise(wrap_experts(model, target_parameters=[*STACKS, ROUTER[kind]], **config), scale=0.5)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def saved_config(folder):
    return json.loads((folder / CONFIG).read_text())


def assert_same_adapter(loaded, model, adapter="default"):
    expected = wrappers(model)
    assert len(wrappers(loaded)) == len(expected)
    for name, layer in wrappers(loaded).items():
        for ours, theirs in zip(factors(layer, adapter), factors(expected[name]), strict=True):
            assert torch.equal(ours, theirs), name


def test_stock_peft_loads_it_and_gives_the_same_logits(tmp_path):
    """In a process without this package, in each of the ways that PEFT and transformers have."""
    loads, expected = [], []
    cases = [("qwen3_moe", "peft", None), ("gpt_oss", "peft", None), ("mixtral", "transformers", None)]
    cases += [("qwen3_moe", "auto", None), ("qwen3_moe", "auto for a task", "CAUSAL_LM")]
    for number, (kind, how, task_type) in enumerate(cases):
        base, adapter = tmp_path / f"{kind} base", tmp_path / f"adapter {number}"
        BUILDERS[kind]().save_pretrained(base)
        model = trained(kind, type(BUILDERS[kind]()).from_pretrained(base), task_type=task_type)
        model.save_pretrained(adapter)
        assert {file.name for file in adapter.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
        expected.append(logits(model))
        loads.append((base, adapter, how))
    results = logits_without_mica(tmp_path, tokens(), *loads)
    for theirs, ours, case in zip(results, expected, cases, strict=True):
        assert error(theirs, ours) <= 5 * RELATIVE[torch.float32], case
        assert error(theirs, logits(BUILDERS[case[0]]())) > 0.05  # the adapter does something


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_file_says_plain_lora_and_what_it_is(tmp_path, task_type):
    model = trained(task_type=task_type)
    model.save_pretrained(tmp_path)
    config = saved_config(tmp_path)
    assert config["init_lora_weights"] is True
    assert config["peft_version"] == f"{peft.__version__}+mica"
    mapping = None
    if task_type is None:  # what PEFT writes for its auto classes
        mapping = {
            "base_model_class": "Qwen3MoeForCausalLM",
            "parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe",
        }
    assert config["auto_mapping"] == mapping
    assert model.peft_config["default"].init_lora_weights == "mica"
    assert model.peft_config["default"].peft_version == peft.__version__


def test_a_disabled_backend_saves_what_stock_loads(tmp_path):
    model = trained()
    with mica.fast.disabled():
        model.save_pretrained(tmp_path)
    assert saved_config(tmp_path)["init_lora_weights"] is True
    assert error(logits(stock_load(qwen3_moe(), tmp_path)), logits(model)) <= RELATIVE[torch.float32]


def test_other_adapters_are_saved_as_before(tmp_path):
    LoraConfig(init_lora_weights="mica", target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert saved_config(tmp_path)["init_lora_weights"] == "mica"
    assert saved_config(tmp_path)["auto_mapping"] is None
    LoraConfig(target_parameters=STACKS).save_pretrained(tmp_path)
    assert saved_config(tmp_path)["auto_mapping"] is None
    assert PeftConfig.from_pretrained(tmp_path).init_lora_weights is True


@pytest.mark.parametrize("mapping", [None, {"base_model_class": "X", "parent_library": "y"}])
def test_a_configuration_comes_back_as_it_was(tmp_path, mapping):
    config = LoraConfig(
        init_lora_weights="mica", target_parameters=STACKS, target_modules=[], auto_mapping=mapping
    )
    before = config.to_dict()
    config.save_pretrained(tmp_path)
    assert config.to_dict() == before
    again = PeftConfig.from_pretrained(tmp_path)
    assert again.to_dict() == {**before, "inference_mode": again.inference_mode}
    again.save_pretrained(tmp_path)
    assert saved_config(tmp_path)["peft_version"] == f"{peft.__version__}+mica"


@pytest.mark.parametrize("mapping", [None, {"base_model_class": "X", "parent_library": "y"}])
def test_the_mark_of_earlier_versions_is_read(mapping):
    old = {**(mapping or {}), "init_lora_weights": "mica"}
    config = LoraConfig(target_parameters=STACKS, target_modules=[], auto_mapping=old)
    assert (config.init_lora_weights, config.auto_mapping) == ("mica", mapping)


def test_a_mapping_with_something_else_is_no_mark(tmp_path):
    config = LoraConfig(target_parameters=STACKS, auto_mapping={"init_lora_weights": "pissa"})
    assert config.init_lora_weights is True
    assert config.auto_mapping == {"init_lora_weights": "pissa"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_here_is_mica_again_without_the_solver(
    tmp_path, solved, dtype, is_trainable, low_cpu_mem_usage
):
    model = trained(base=qwen3_moe().to(dtype))
    model.save_pretrained(tmp_path)
    solved.clear()
    options = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(qwen3_moe().to(dtype), tmp_path, **options)
    loaded.load_adapter(tmp_path, "second", is_trainable=is_trainable)
    assert not solved
    assert loaded.peft_config["default"].init_lora_weights == "mica"
    if dtype == torch.float32 or not low_cpu_mem_usage:  # with that option stock rounds to the base dtype
        assert_same_adapter(loaded, model)
    assert_same_adapter(loaded, model, "second")
    for layer in wrappers(loaded).values():
        for adapter in ("default", "second"):
            assert layer.frozen_peft_weight_names[adapter] == ("lora_B",)
            assert not layer.lora_B[adapter].weight.requires_grad
        assert layer.lora_A["default"].weight.requires_grad == is_trainable


def test_a_resumed_adapter_trains_a_only(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(qwen3_moe(), tmp_path, is_trainable=True).train()
    optimizer = torch.optim.SGD([p for p in resumed.parameters() if p.requires_grad], lr=1.0)
    resumed(input_ids=tokens()).logits.square().mean().backward()
    optimizer.step()
    for name, layer in wrappers(resumed).items():
        (A, B), (old_A, old_B) = factors(layer), factors(wrappers(model)[name])
        assert torch.equal(B, old_B)
        assert not torch.equal(A, old_A)
    resumed.save_pretrained(tmp_path)
    assert saved_config(tmp_path)["peft_version"].endswith("+mica")


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_auto_classes(tmp_path, task_type):
    qwen3_moe().save_pretrained(tmp_path / "base")
    model = trained(base=type(qwen3_moe()).from_pretrained(tmp_path / "base"), task_type=task_type)
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModel if task_type is None else AutoPeftModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert_same_adapter(loaded, model)
    assert all(layer.lora_variant for layer in wrappers(loaded).values())


def test_the_mark_is_left_alone_while_the_backend_is_disabled(tmp_path):
    """Stock would refuse what it says; saved again it is still there."""
    trained().save_pretrained(tmp_path / "first")
    loaded = stock_load(qwen3_moe(), tmp_path / "first")
    assert loaded.peft_config["default"].init_lora_weights is True
    assert not any(layer.lora_variant for layer in wrappers(loaded).values())
    config = loaded.peft_config["default"]
    config.save_pretrained(tmp_path / "again")
    assert PeftConfig.from_pretrained(tmp_path / "again").init_lora_weights == "mica"


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_mark_survives_stock_s_load_and_save(tmp_path, task_type):
    model = trained(task_type=task_type)
    model.save_pretrained(tmp_path / "first")
    with mica.fast.disabled():
        stock_load(qwen3_moe(), tmp_path / "first").save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(qwen3_moe(), tmp_path / "again", is_trainable=True)
    assert_same_adapter(loaded, model)
    assert {n.split(".")[-3] for n, p in loaded.named_parameters() if p.requires_grad} == {"lora_A"}


def lose_the_mark(folder):
    config = saved_config(folder)
    config["peft_version"] = config["peft_version"].removesuffix("+mica")
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("gate_up", ["fused", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_mark_is_noticed(tmp_path, dtype, gate_up):
    mica.fast.enable(gate_up=gate_up)
    model = trained(base=qwen3_moe().to(dtype), autocast_adapter_dtype=False)  # in bf16, B is rounded to it
    model.save_pretrained(tmp_path)
    lose_the_mark(tmp_path)
    with pytest.warns(UserWarning, match=r"adapter 'default' was loaded as LoRA, .*append '\+mica' to the"):
        loaded = PeftModel.from_pretrained(qwen3_moe().to(dtype), tmp_path)
    with pytest.warns(UserWarning, match=r"adapter 'second' was loaded as LoRA"):
        loaded.load_adapter(tmp_path, "second")
    with pytest.warns(UserWarning, match=r"adapter 'default' was loaded as LoRA"):
        qwen3_moe().to(dtype).load_adapter(str(tmp_path))


@pytest.mark.filterwarnings("error:.*loaded as LoRA")
def test_trained_lora_has_lost_no_mark(tmp_path):
    model = wrap_experts(qwen3_moe(), stock=True)
    for layer in wrappers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(qwen3_moe(), tmp_path)


def test_a_parameter_missing_in_the_checkpoint_gets_its_bases(tmp_path, solved):
    """Of nested wrappers too, whose keys in the file have another form than their names."""
    model = trained()
    model.save_pretrained(tmp_path)
    missing = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
    weights = load_file(tmp_path / WEIGHTS)
    save_file({name: weight for name, weight in weights.items() if name != missing}, tmp_path / WEIGHTS)
    solved.clear()
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(qwen3_moe(), tmp_path)
    assert solved == [(48, 32)] * 6
    assert_same_adapter(loaded, model)
