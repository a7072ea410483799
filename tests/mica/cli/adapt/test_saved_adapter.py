"""What the files of an adapter say, and which of them are refused, in one line."""

import pytest
from safetensors.torch import load_file, save_file

from mica.cli.adapt import saved_adapter
from mica.cli.adapt.saved_adapter import CONFIG, WEIGHTS
from mica.errors import UsageError
from tests.support.adapt_runs import edit_json, write_adapter
from tests.support.tables import rows


@pytest.fixture
def folder(tmp_path):
    """That of an adapter on q_proj and down_proj, rank 4 and alpha 8, which a test may break."""
    write_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_settings_of_an_adapter(folder):
    expected = {"rank": 4, "alpha": 8, "target_modules": "down_proj,q_proj", "experts": None, "dropout": 0.0}
    expected |= {"method": "mica", "train_embeddings": None}
    assert saved_adapter.read(folder).settings() == expected
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
    with pytest.raises(UsageError, match=f"^--adapter {folder}: .*{message}"):
        saved_adapter.read(folder)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", ["x", None, 0, [4]])
def test_a_value_that_is_no_number(name, value, folder):
    edit_json(folder / CONFIG, **{name: value})
    with pytest.raises(
        UsageError, match=f"^--adapter {folder}: adapter_config.json: {name} must be a number"
    ):
        saved_adapter.read(folder)


def test_no_folder_and_no_weights(folder):
    with pytest.raises(UsageError, match=r"safetensors: is a file; give the folder of the adapter$"):
        saved_adapter.read(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=r"has no adapter_model.safetensors"):
        saved_adapter.read(folder)


def test_weights_that_are_broken_or_lack_a_factor(folder):
    """Else a B that is missing would be solved anew, for A's that belong to another."""
    weights = load_file(folder / WEIGHTS)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(UsageError, match=r"is incomplete: .* has only A or only B"):
        saved_adapter.read(folder)
    (folder / WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(UsageError, match="cannot be read"):
        saved_adapter.read(folder)
