"""Where a model is loaded from and to, in which dtype, which layers are targets, and what is printed."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mica.cli import loading
from mica.cli.loading import (
    find_device,
    find_source,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
    suit_processor,
)
from mica.errors import UsageError
from tests.support import models
from tests.support.adapt_runs import working_in
from tests.support.processes import ROOT
from tests.support.tiny_cli import tiny_llama


@pytest.mark.parametrize("make", [models.tiny_gpt2, models.tiny_llama])
def test_a_skeleton_has_the_modules_of_the_model_and_no_weights(make, tmp_path):
    make().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    model = skeleton(find_source(str(tmp_path), False))
    assert torch.equal(torch.get_rng_state(), before)
    assert str(model) == str(make())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_quantised_checkpoint_keeps_its_dtype(monkeypatch):
    monkeypatch.setattr("mica.cli.loading.has_native", lambda dtype: False)
    model = tiny_llama().bfloat16()
    model.is_quantized = True
    assert "quantised and computes in bfloat16" in suit_processor(model, "auto")
    assert model.dtype == torch.bfloat16


def test_an_explicit_dtype_is_kept_and_its_cost_said(monkeypatch):
    monkeypatch.setattr("mica.cli.loading.has_native", lambda dtype: False)
    model = tiny_llama().bfloat16()
    said = suit_processor(model, "bfloat16")
    assert said.startswith("--dtype bfloat16: this processor has no bfloat16 instructions")
    assert "--dtype float32 is faster" in said
    assert model.dtype == torch.bfloat16


def test_message_of_a_missing_tokenizer_is_whole(tmp_path):
    """Also where there are some of its files: what transformers says then."""
    tiny_llama().save_pretrained(tmp_path)
    missing = rf"^--model {tmp_path}: has no tokenizer \(no tokenizer\.json or tokenizer\.model\); save "
    with pytest.raises(UsageError, match=missing):
        load_tokenizer(find_source(str(tmp_path), False))
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    whole = rf"^--model {tmp_path}: its tokenizer cannot be loaded: .*\.$"  # . is no line end
    with pytest.raises(UsageError, match=whole):
        load_tokenizer(find_source(str(tmp_path), False))


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    source = find_source(str(tmp_path), False)
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UsageError, match=f"^--model {tmp_path}: its weights cannot be read: "):
        load_model(source, "float32")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match=f"^--model {tmp_path}: is not a checkpoint: it has no config.json$"):
        load_config(source)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}', encoding="utf-8")
    with pytest.raises(UsageError, match=f"^--model {tmp_path}: is an adapter for base, not a model: "):
        load_config(source)


HUB_ID = "someone/model"
ASKED = f"mica: asking the Hugging Face Hub for {HUB_ID}: there is no such folder\n"


@pytest.mark.parametrize(
    "load", [load_tokenizer, load_config, skeleton, lambda one: load_model(one, "float32")]
)
@pytest.mark.parametrize(
    ("location", "is_offline", "rank", "said"),
    [
        (HUB_ID, False, "0", ASKED),
        (HUB_ID, False, "1", ""),  # the first process says it
        (HUB_ID, True, "0", ""),
        ("/a/folder/that/has/gone", False, "0", ""),
        (str(ROOT), False, "0", ""),
    ],
)
def test_it_is_said_once_before_the_hub_is_asked(monkeypatch, capsys, load, location, is_offline, rank, said):
    heard = []

    def unreachable(*_, **__):
        heard.append(capsys.readouterr().err)
        raise OSError("We couldn't connect to it.")

    monkeypatch.setattr(loading, "find_adapter_config_file", unreachable)
    for kind in (loading.AutoConfig, loading.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_offline)
    monkeypatch.setenv("RANK", rank)
    loading.note_hub.cache_clear()
    with pytest.raises(UsageError):
        load(loading.Source(location, location, {}))
    assert heard[0] == said
    assert "".join(heard[1:]) + capsys.readouterr().err == ""


def test_a_relative_folder_becomes_absolute(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    with working_in(tmp_path):
        source = find_source("model", False)
        model = load_model(source, "float32")
    assert source.given == "model"
    assert source.location == model.name_or_path == str(tmp_path / "model")


def test_among_several_processes_the_device_is_this_ones(monkeypatch):
    here = find_device()
    monkeypatch.setattr("mica.cli.loading.PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    assert find_device() == here
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert find_device() == torch.device("meta")


@pytest.mark.slow
def test_libraries_say_nothing_on_the_terminal(tmp_path):
    """What torchao, bitsandbytes and torch log as they are imported would hide the one line of an error."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mica", "inspect", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("mica inspect: error: ")
