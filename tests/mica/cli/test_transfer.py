"""``mica transfer``: the update of an adapter in the weights of a sibling, and all that is refused."""

import json
import re
import shutil

import pytest
import torch
from peft import VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from mica.cli import folder
from mica.cli.output import SCRATCH, write_text
from tests.support.adapt_runs import (
    edit_json,
    poison_solver,
    sibling,
    transfer,
    working_in,
    write_adapter,
)
from tests.support.faults import FULL, raising
from tests.support.tiny_cli import byte_tokenizer, logits, tiny_llama

CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


def chat_tokenizer():
    """The byte tokenizer with a token of its own at the end, and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<user>", special=True)])
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter of rank 4 and alpha 8, the model with it, and the folder of a sibling."""
    folder = tmp_path_factory.mktemp("made")
    tuned = write_adapter(folder / "adapter")
    sibling(tiny_llama(vocab_size=258)).save_pretrained(folder / "chat")
    chat_tokenizer().save_pretrained(folder / "chat")
    return folder / "adapter", tuned, folder / "chat"


@pytest.fixture
def copies(made, tmp_path):
    """Folders of adapter and sibling that a test may break, and of an output."""
    adapter, chat = tmp_path / "adapter", tmp_path / "chat"
    shutil.copytree(made[0], adapter)
    shutil.copytree(made[2], chat)
    return adapter, chat, tmp_path / "out"


@pytest.fixture
def refused(refused, copies):
    """A transfer is, in one line with all ``parts`` in it, and writes nothing."""
    adapter, chat, out = copies

    def transfer_refused(*parts, adapter=adapter, to=chat):
        refused(transfer(adapter, to, out), *parts)
        assert not out.exists()

    return transfer_refused


def test_what_is_written(made, tmp_path, monkeypatch, capsys):
    adapter, _, chat = made
    out = tmp_path / "out"
    poison_solver(monkeypatch)
    assert transfer(adapter, chat, out, "--dtype bfloat16") == 0
    assert "257 tokens in common, with the same ids; 1 only in " in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT
    card = (out / "README.md").read_text()
    assert "merged into bfloat16: rounding swallowed" in card
    assert "adds with rank 4 and alpha 8 in 4 layers" in " ".join(card.split())
    names = {}
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    with working_in(tmp_path):
        exec(code, names)
    assert torch.equal(logits(names["model"]), logits(AutoModelForCausalLM.from_pretrained(out)))


def test_nothing_is_replaced(copies, capsys):
    adapter, chat, out = copies
    out.mkdir()
    (out / "old").touch()
    for output in (out, chat, adapter):
        assert transfer(adapter, chat, output) == 2
        assert f"--output {output}: is not empty: choose another folder" in capsys.readouterr().err
    (out / "old").unlink()
    with folder.exclusive(out):
        assert transfer(adapter, chat, out) == 2
    assert "another command writes to it" in capsys.readouterr().err
    assert transfer(adapter, chat, out) == 0


def test_a_transfer_that_was_killed_can_be_given_again(made, output):
    adapter, _, chat = made
    (output / SCRATCH).mkdir(parents=True)
    (output / SCRATCH / "model.safetensors").write_text("{")
    write_text("--output", output / "config.json", "{")
    assert transfer(adapter, chat, output) == 0
    assert not list(output.glob(".*"))
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 258


def test_adapters_and_models_that_are_refused(copies, tmp_path, refused):
    adapter, chat, _ = copies
    refused("no such folder", adapter=tmp_path / "no")
    refused("--to ./nowhere: no such file or folder", to="./nowhere")
    vera = tmp_path / "vera"
    get_peft_model(tiny_llama(), VeraConfig(target_modules=["q_proj"])).save_pretrained(vera)
    refused(f"--adapter {vera}: must be a plain MiCA, LoRA or DoRA", adapter=vera)
    smaller = tmp_path / "smaller"
    byte_tokenizer().save_pretrained(smaller)
    refused(f"--to {smaller}: ", to=smaller)
    tiny_llama(num_hidden_layers=4).save_pretrained(smaller)
    refused("no weights for model.layers.2.", f"{smaller} (4 such differences)", to=smaller)
    edit_json(adapter / "adapter_config.json", modules_to_save=["lm_head"])
    refused("replaces whole modules, lm_head, which are not the embeddings of --to")
    edit_json(chat / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(f"--to {chat}: is quantised")


EDITED = """
{"rank_pattern": {"q_proj": "x"}}
{"target_modules": "("}
{"target_modules": ["nope"]}
{"use_dora": true}
{"lora_dropout": "x"}
{"r": 3}
{"megatron_config": {"a": 1}}
{"trainable_token_indices": [1]}
""".strip().splitlines()


@pytest.mark.parametrize("changes", EDITED)
def test_a_configuration_that_was_edited(copies, refused, changes):
    adapter, *_ = copies
    edit_json(adapter / "adapter_config.json", **json.loads(changes))
    refused(f"PEFT cannot load the adapter in {adapter}")


@pytest.mark.parametrize("known_by", ["summary", "base", "nothing"])
def test_model_of_another_architecture(copies, tmp_path, capsys, refused, known_by, model_dir):
    """Its layers have the same names and shapes, like those of Mistral and Llama."""
    adapter, chat, _ = copies
    if known_by == "summary":
        (adapter / "summary.json").write_text('{"model_type": "llama"}')
    elif known_by == "base":
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(model_dir))
    assert transfer(adapter, chat, tmp_path / "sibling") == 0
    told = "not compared: no base found" if known_by == "nothing" else "as the adapter's base"
    assert f"architecture  llama, {told}" in capsys.readouterr().out
    edit_json(chat / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
    if known_by != "nothing":
        told = "its model type is mistral, that of the adapter's base is llama"
        refused(f"--to {chat}: {told}")


def test_an_adapter_that_is_not_finite(copies, refused):
    adapter, *_ = copies
    path = adapter / "adapter_model.safetensors"
    save_file({name: weight * torch.nan for name, weight in load_file(path).items()}, path)
    refused(f"--adapter {adapter}: NaNs detected in the merged weights")


def test_tokenizer_of_another_model(copies, refused):
    _, chat, _ = copies
    path = chat / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    vocabulary = model["vocab"]
    edit_json(path, model=model | {"vocab": vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}})
    refused(f"--to {chat}: its tokenizer is not that", "2 of 257 common", "'a' is")


def test_adapter_without_a_tokenizer(copies, refused, model_dir):
    adapter, chat, out = copies
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    refused("has no tokenizer, and neither has its base")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(model_dir))  # whose counts then
    assert transfer(adapter, chat, out) == 0


def test_full_disk_leaves_nothing(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", raising(FULL))
    refused("--output ", "cannot be written: No space left on device")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "chat"}
