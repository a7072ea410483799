"""Adapters that come from a file or from other adapters: the bits that stock gives, without the solver."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import mica.fast
from tests.support.models import Net, adapted_layers, bases, net, randomise, stock_load, tiny_llama, wrap
from tests.support.moe_models import ROUTER, STACKS, gpt_oss, wrap_experts
from tests.support.peft_versions import is_at_least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_runs_no_solver_and_gives_what_stock_gives(dtype, low_cpu_mem_usage, tmp_path, solved):
    """Fault 4."""
    randomise(net(dtype)).save_pretrained(tmp_path)
    solved.clear()
    loaded = PeftModel.from_pretrained(
        Net(dtype), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    loaded.load_adapter(tmp_path, "second")
    assert not solved
    # with low_cpu_mem_usage stock rounds a loaded adapter to the base dtype on its way; so do we
    expected = stock_load(Net(dtype), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    with mica.fast.disabled():
        expected.load_adapter(tmp_path, "second")
    theirs = dict(expected.named_parameters())
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, theirs[name]), name
            assert parameter.dtype == torch.float32
            # loading a second adapter for inference freezes the first one too before 0.21
            trained = ".default" in name and "_A" in name and is_at_least("0.21")
            assert parameter.requires_grad == trained, name


def test_add_weighted_adapter_runs_no_solver(solved):
    model = randomise(net())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    solved.clear()
    model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "sum", combination_type="linear")
    assert not solved
    with mica.fast.disabled():
        model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "stock", combination_type="linear")
    theirs = dict(model.named_parameters())
    for name, parameter in theirs.items():
        if ".sum" in name:
            assert torch.equal(parameter, theirs[name.replace(".sum", ".stock")])


def test_a_layer_missing_in_the_checkpoint_gets_its_basis(tmp_path, solved):
    """Never a silent zero: PEFT warns of the missing keys, and B is what a new adapter would have."""
    randomise(net(targets=["up"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"up"', '"up", "conv"'))
    solved.clear()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert solved == [(16, 20)]
    assert torch.equal(bases(loaded)["base_model.model.conv"], bases(net())["base_model.model.conv"])


def test_a_checkpoint_with_a_and_without_b_keeps_its_a(tmp_path):
    model = randomise(net(targets=["up"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if "lora_A" in key}
    save_file(tensors, file)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(Net(), tmp_path)
    expected, layer = (m.base_model.model.up for m in (model, loaded))
    assert torch.equal(layer.lora_A["default"].weight, expected.lora_A["default"].weight)
    assert torch.equal(layer.lora_B["default"].weight, expected.lora_B["default"].weight)


def test_only_the_missing_layer_gets_a_basis_where_names_end_alike(tmp_path, solved):
    """The B of ``proj`` is in the checkpoint, and stays although that of ``vision.proj`` is missing."""

    def nested():
        return nn.ModuleDict(
            {"proj": nn.Linear(20, 16), "vision": nn.ModuleDict({"proj": nn.Linear(24, 12)})}
        )

    torch.manual_seed(0)
    randomise(wrap(nested(), targets=["proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: -value for key, value in load_file(file).items() if "vision" not in key}
    save_file(tensors, file)
    solved.clear()
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(nested(), tmp_path)
    assert solved == [(12, 24)]
    (B,) = (value for key, value in tensors.items() if "lora_B" in key)
    assert torch.equal(loaded.base_model.model["proj"].lora_B["default"].weight, B)


@pytest.mark.parametrize(
    ("build", "adapt"),
    [
        (tiny_llama, lambda base: wrap(base, targets=["q_proj"])),
        (gpt_oss, lambda base: wrap_experts(base, target_parameters=[*STACKS, ROUTER["gpt_oss"]])),
    ],
)
def test_transformers_own_loader_runs_no_solver(build, adapt, tmp_path, solved):
    model = randomise(adapt(build()))
    model.save_pretrained(tmp_path)
    solved.clear()
    loaded = build()
    loaded.load_adapter(str(tmp_path))
    assert not solved
    assert all(layer.lora_variant for layer in adapted_layers(loaded).values())
    expected = dict(model.base_model.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, expected[name])
            assert not (parameter.requires_grad and "lora_B" in name)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_base_beside_the_adapter_is_found_where_both_have_moved(checkpoint, tmp_path, monkeypatch):
    """Not that of another run, which has taken the old place; stock finds nothing else."""
    base = randomise(wrap(tiny_llama(), targets=["q_proj"])).merge_and_unload()
    base.save_pretrained(tmp_path / "out" / "base")
    folder = "out/checkpoint-3" if checkpoint else "out"
    model = randomise(
        wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base"), targets=["up_proj"])
    )
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(tmp_path / folder)
    (tmp_path / "moved").mkdir()
    (tmp_path / "out").rename(tmp_path / "moved" / "out")
    tiny_llama().save_pretrained(tmp_path / "out" / "base")
    ids = torch.arange(8)[None]
    monkeypatch.chdir(tmp_path / "moved")
    for place in (folder, tmp_path / "moved" / folder):
        loaded = AutoPeftModelForCausalLM.from_pretrained(place)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        with mica.fast.disabled():
            recorded = PeftConfig.from_pretrained(place).base_model_name_or_path
        assert recorded == str(tmp_path / "out" / "base")


@pytest.mark.parametrize("name", ["owner/base", "base", "/elsewhere/base-1B", "", None])
def test_any_other_name_of_a_base_stays(name, tmp_path):
    LoraConfig(base_model_name_or_path=name).save_pretrained(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").touch()
    assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == name
