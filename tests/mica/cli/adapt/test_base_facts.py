"""What a run records of its base, and what is compared with it."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mica.cli.adapt import base, embeddings
from tests.support.adapt_runs import edit_json, saved, sibling, summary, transfer, weights
from tests.support.tiny_cli import adapt, tiny_llama

NOTE = "cannot check that its base"


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_file):
    """A folder with a float32 ``base``, a sibling ``chat``, and ``run``, which began in bfloat16."""
    folder = tmp_path_factory.mktemp("made")
    saved(tiny_llama(), folder / "base")
    saved(sibling(tiny_llama()), folder / "chat")
    options = "--dtype bfloat16 --train-embeddings --save-steps 8"
    assert adapt(folder / "base", text_file, folder / "run", options) == 0
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy of all of it, whose adapters name the base in it; a test may change that."""
    folder = tmp_path / "copied"
    shutil.copytree(made, folder)
    for path in folder.glob("run/**/adapter_config.json"):
        edit_json(path, base_model_name_or_path=str(folder / "base"))
    return folder


def to_chat(folder, adapter="run") -> int:
    return transfer(folder / adapter, folder / "chat", folder / "out")


def weight_of(folder, name: str) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).get_submodule(name).weight.detach()


def check_transferred(folder, adapter="run", untrained_tokens=200) -> None:
    """What is in ``out`` is the sibling plus trained − rounded base: nothing where nothing was trained."""
    for name in ("model.embed_tokens", "lm_head"):
        began = weight_of(folder / "base", name).bfloat16().double()
        trained = weights(folder / adapter)[f"base_model.model.{name}.weight"]
        update = trained.double() - began
        there = weight_of(folder / "chat", name)
        expected = there.double() + update
        found = weight_of(folder / "out", name)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-8)
        assert update.abs().max() > 1e-3
        if name == "model.embed_tokens":
            untrained = (update == 0).all(dim=1)  # tokens that the text does not have
            assert untrained.sum() > untrained_tokens
            assert torch.equal(found[untrained], there[untrained])


def test_the_rounding_of_the_base_is_no_update(copied, capsys):
    assert to_chat(copied) == 0
    assert NOTE not in capsys.readouterr().err
    check_transferred(copied)


@pytest.mark.parametrize("adapter", ["run", "run/checkpoint-8"])
def test_another_base_under_the_same_name_is_refused(copied, adapter, capsys):
    saved(sibling(tiny_llama(), seed=7), copied / "base")
    assert to_chat(copied, adapter) == 2
    said = capsys.readouterr().err
    assert f"--adapter {copied / adapter}: its base {copied / 'base'} is not what it was" in said
    assert "computed with the base of the run: put that back there" in said
    assert not (copied / "out").exists()


def test_what_is_not_recorded_is_noted(copied, capsys):
    (copied / "run" / "summary.json").unlink()
    assert base.read_facts(copied / "run") == {}
    assert to_chat(copied) == 0
    said = capsys.readouterr().err
    assert f"mica transfer: note: --adapter {copied / 'run'}: {NOTE} {copied / 'base'} is what it was" in said


def test_an_adapter_of_peft_is_noted_and_its_dtype_counts(copied, capsys):
    """PEFT copies the embeddings of a base in its dtype."""
    model = AutoModelForCausalLM.from_pretrained(copied / "base", dtype=torch.bfloat16)
    names = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    tuned = get_peft_model(model, LoraConfig(init_lora_weights="mica", r=4, **names))
    for weight in embeddings.trained(tuned):
        weight.data[:128] += 0.01
    tuned.save_pretrained(copied / "theirs")
    edit_json(copied / "theirs" / "adapter_config.json", base_model_name_or_path=str(copied / "base"))
    assert to_chat(copied, "theirs") == 0
    assert NOTE in capsys.readouterr().err
    check_transferred(copied, "theirs", untrained_tokens=128)  # the first 128 of 257 are trained


def test_it_is_kept_by_whoever_goes_on(copied, text_file, capsys):
    """A second run adds to the embeddings of the first, which began with a base in bfloat16."""

    def go_on(base, output) -> int:
        options = "--adapter", copied / "run", "--steps 1 --dtype float32"
        return adapt(copied / base, text_file, copied / output, *options)

    assert go_on("base", "on") == 0
    assert "--adapter" not in capsys.readouterr().err
    first, second = summary(copied / "run"), summary(copied / "on")
    assert first["base_dtype"] == second["base_dtype"] == "bfloat16"
    assert second["base_weights"] == first["base_weights"] is not None
    assert to_chat(copied, "on") == 0
    check_transferred(copied, "on")

    note = f"--adapter {copied / 'run'}: is not known to be trained on the weights of --model"
    assert go_on("chat", "other") == 0
    assert note in capsys.readouterr().err
    (copied / "run" / "summary.json").unlink()
    assert go_on("base", "unknown") == 0
    assert note in capsys.readouterr().err
