"""Where the adapter of a run comes from: new, a checkpoint's, or that of --adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mica.cli.adapt import adapter
from mica.errors import UsageError
from tests.support.adapt_runs import adapter_settings as settings
from tests.support.adapt_runs import factors, poison_solver, write_adapter
from tests.support.tiny_cli import tiny_llama


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of an adapter on q_proj and down_proj, rank 4 and alpha 8, and the model with it."""
    folder = tmp_path_factory.mktemp("made")
    return folder, write_adapter(folder)


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(made[0], tmp_path / "adapter")


def change(folder, **values):
    path = folder / adapter.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", ["checkpoint", "--adapter"])
def test_b_is_kept_to_the_bit_and_nothing_is_solved(option, dtype, made, monkeypatch):
    folder, before = made
    poison_solver(monkeypatch)
    args = settings(adapter=None if option == "checkpoint" else folder, dropout=0.125)
    base = tiny_llama().to(dtype)
    base.name_or_path = "another/name"
    model = adapter.start(base, args, folder if option == "checkpoint" else None)
    for factor in "AB":
        expected = factors(before, factor)
        assert expected
        for name, weight in factors(model, factor).items():
            assert torch.equal(weight, expected[name]), name
            assert weight.dtype == torch.float32
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == set(factors(model, "A"))
    config = model.peft_config["default"]
    assert (config.lora_dropout, config.base_model_name_or_path) == (0.125, "another/name")


def test_settings_of_an_adapter(folder):
    expected = {"rank": 4, "alpha": 8, "target_modules": "down_proj,q_proj", "experts": None, "dropout": 0.0}
    expected["train_embeddings"] = None
    assert adapter.settings(adapter.read_adapter_config(folder), folder) == expected
    change(folder, target_modules=r".*layers\.1.*(q_proj|down_proj)")
    names = adapter.settings(adapter.read_adapter_config(folder), folder)["target_modules"]
    assert names.split(",")[0] == "model.layers.0.mlp.down_proj"  # what has weights, whatever the pattern
    change(folder, rank_pattern={"q_proj": 4})
    with pytest.raises(UsageError, match=r"^--adapter .*different ranks"):
        adapter.settings(adapter.read_adapter_config(folder), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "q_proj"}, r"^--target-modules q_proj: .*down_proj only in the adapter"),
        ({"target_modules": "q_proj,down_proj,v_proj"}, r"v_proj not in the adapter$"),
    ],
)
def test_options_that_the_adapter_contradicts(changes, message, made):
    with pytest.raises(UsageError, match=message):
        adapter.start(tiny_llama(), settings(adapter=made[0], **changes))
    with pytest.raises(UsageError, match=message.replace("--adapter", "--resume")):
        adapter.start(tiny_llama(), settings(**changes), made[0])


def test_model_without_these_layers_or_with_other_shapes(made, tmp_path):
    with pytest.raises(UsageError, match=r"model\.layers\.1\.\S*, which --model does not have$"):
        adapter.start(tiny_llama(num_hidden_layers=1), settings(adapter=made[0]))
    wide = tiny_llama(intermediate_size=64)
    with pytest.raises(UsageError, match=r"down_proj as a layer of 32 x 48, but in --model it has 32 x 64$"):
        adapter.start(wide, settings(adapter=made[0]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is not a PEFT adapter folder \(no adapter_config.json\)"),
        ("{", "is not the configuration of a PEFT adapter"),
        ("[" * 100_000, "is not the configuration of a PEFT adapter"),
        ("{}", "is not the configuration of a PEFT adapter"),
        ('{"peft_type": "IA3"}', "must be a MiCA adapter, but is IA3"),
        ('{"peft_type": "LORA", "init_lora_weights": true}', "but is LoRA with init_lora_weights=True"),
    ],
)
def test_no_mica_adapter(content, message, folder):
    (folder / adapter.CONFIG).unlink()
    if content is not None:
        (folder / adapter.CONFIG).write_text(content)
    with pytest.raises(UsageError, match=f"^--adapter {folder}: .*{message}"):
        adapter.read_adapter_config(folder)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", ["x", None, 0, [4]])
def test_a_value_that_is_no_number(name, value, folder):
    change(folder, **{name: value})
    with pytest.raises(
        UsageError, match=f"^--adapter {folder}: adapter_config.json: {name} must be a number"
    ):
        adapter.read_adapter_config(folder)


def test_no_folder_and_no_weights(folder):
    with pytest.raises(UsageError, match=r"safetensors: is a file; give the folder of the adapter$"):
        adapter.read_adapter_config(folder / adapter.WEIGHTS)
    (folder / adapter.WEIGHTS).unlink()
    with pytest.raises(UsageError, match=r"has no adapter_model.safetensors"):
        adapter.read_adapter_config(folder)


def test_weights_that_are_broken_or_lack_a_factor(folder):
    """Else a B that is missing would be solved anew, for A's that belong to another."""
    weights = load_file(folder / adapter.WEIGHTS)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, folder / adapter.WEIGHTS)
    with pytest.raises(UsageError, match=r"is incomplete: .* has only A or only B"):
        adapter.start(tiny_llama(), settings(adapter=folder))
    (folder / adapter.WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(UsageError, match="cannot be read"):
        adapter.start(tiny_llama(), settings(adapter=folder))
