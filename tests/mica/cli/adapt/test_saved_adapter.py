"""What the files of an adapter say, and which of them are refused, in one line."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mica.cli.adapt import saved_adapter
from mica.cli.adapt.saved_adapter import CONFIG, WEIGHTS
from mica.errors import UsageError
from tests.support.adapt_runs import edit_json, write_adapter
from tests.support.moe_models import qwen3_moe
from tests.support.tables import rows
from tests.support.tiny_cli import tiny_llama


@pytest.fixture
def folder(tmp_path):
    """That of an adapter on q_proj and down_proj, rank 4 and alpha 8, which a test may break."""
    write_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(path, message):
    with pytest.raises(UsageError, match=message):
        saved_adapter.read(path)


def test_settings_of_an_adapter(folder):
    assert saved_adapter.read(folder).settings() == {
        "method": "mica",
        "rank": 4,
        "alpha": 8,
        "target_modules": "down_proj,q_proj",
        "experts": None,
        "dropout": 0.0,
        "train_embeddings": None,
    }
    edit_json(folder / CONFIG, target_modules=r".*layers\.1.*(q_proj|down_proj)")
    names = saved_adapter.read(folder).settings()["target_modules"]
    assert names.split(",")[0] == "model.layers.0.mlp.down_proj"  # what has weights, whatever the pattern
    edit_json(folder / CONFIG, rank_pattern={"q_proj": 4})
    with pytest.raises(UsageError, match=r"^--adapter .*different ranks"):
        saved_adapter.read(folder).settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *rows(r"""
{ => is not the configuration of a PEFT adapter
{} => is not the configuration of a PEFT adapter
{"peft_type": "IA3"} => must be a plain MiCA, LoRA or DoRA adapter, but is IA3
{"peft_type": "LORA", "init_lora_weights": "pissa"} => but is LoRA with init_lora_weights='pissa'
{"peft_type": "LORA", "bias": "all"} => but is LoRA with bias='all'
{"peft_type": "LORA", "lora_bias": true} => but is LoRA with lora_bias
"""),
        ("[" * 100_000, "is not the configuration of a PEFT adapter"),
        (None, r"is not a PEFT adapter folder \(no adapter_config.json\)"),
    ],
)
def test_no_mica_adapter(content, message, folder):
    (folder / CONFIG).unlink()
    if content is not None:
        (folder / CONFIG).write_text(content)
    refused(folder, f"^--adapter {folder}: .*{message}")


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", ["x", None, 0, [4]])
def test_a_value_that_is_no_number(name, value, folder):
    edit_json(folder / CONFIG, **{name: value})
    refused(folder, f"^--adapter {folder}: adapter_config.json: {name} must be a number")


def test_no_folder_and_no_weights(folder):
    refused(folder / WEIGHTS, "safetensors: is a file; give the folder of the adapter$")
    (folder / WEIGHTS).unlink()
    refused(folder, "has no adapter_model.safetensors")


def test_weights_that_are_broken_or_lack_a_factor(folder):
    """Else a B that is missing would be solved anew, for A's that belong to another."""
    weights = load_file(folder / WEIGHTS)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, folder / WEIGHTS)
    refused(folder, "is incomplete: .* has only A or only B")
    (folder / WEIGHTS).write_bytes(b"half a file")
    refused(folder, "cannot be read")


def add(folder, name: str, *shape: int) -> None:
    save_file(load_file(folder / WEIGHTS) | {f"base_model.model.{name}": torch.ones(shape)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("size", "value", "message"),
    rows("""
num_hidden_layers => 3 => has no weights for model.layers.2.self_attn.q_proj, which .* adapts in --to
num_hidden_layers => 1 => adapts model.layers.1.mlp.down_proj, which --to does not have
intermediate_size => 64 => down_proj as a layer of 32 x 48, but in --to it has 32 x 64
"""),
)
def test_another_model(size, value, message, folder):
    """Of each of these layers there are two."""
    model = tiny_llama(**{size: int(value)}).to("meta")
    with pytest.raises(UsageError, match=rf"^--adapter {folder}: .*{message} \(2 such differences\)$"):
        saved_adapter.read(folder).check_fit(model, "--to")


def test_weights_that_are_no_factors(folder):
    """PEFT writes the weights of adapted embeddings too, and ignores what it does not know."""
    add(folder, "model.embed_tokens.base_layer.weight", 257, 32)
    saved_adapter.read(folder).check_fit(tiny_llama())
    add(folder, "model.q_proj.lora_magnitude_vector", 32)
    with pytest.raises(UsageError, match=r"has model.q_proj.lora_magnitude_vector, which --model does not"):
        saved_adapter.read(folder).check_fit(tiny_llama())
    edit_json(folder / CONFIG, use_dora=True)
    saved_adapter.read(folder).check_fit(tiny_llama())


def test_a_model_with_other_experts(tmp_path):
    write_adapter(tmp_path, qwen3_moe(), experts=True)
    saved = saved_adapter.read(tmp_path)
    saved.check_fit(qwen3_moe())
    what = r"experts(.base_layer)? as a parameter of 6 x \d+ x \d+, but in --model it has 5 x \d+ x \d+"
    with pytest.raises(UsageError, match=rf"{what} \(4 such differences\)$"):
        saved.check_fit(qwen3_moe(experts=5))
    kept = {name: found for name, found in saved.layers.items() if name not in saved.stacks}
    with pytest.raises(UsageError, match=r"has no weights for model.layers.0.mlp.experts, .*\(4 such diff"):
        replace(saved, layers=kept).check_fit(qwen3_moe())
