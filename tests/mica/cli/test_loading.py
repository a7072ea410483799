"""Where a model is loaded from and to, in which dtype, and what is printed."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from mica.cli import loading, output
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
from tests.support.adapt_runs import edit_json, working_in
from tests.support.processes import start
from tests.support.tables import rows
from tests.support.tiny_cli import tiny_llama


@pytest.mark.parametrize("make", [models.tiny_gpt2, models.tiny_llama])
def test_a_skeleton_has_the_modules_of_the_model_and_no_weights(make, tmp_path):
    make().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    model = skeleton(find_source(str(tmp_path), False))
    assert torch.equal(torch.get_rng_state(), before)
    assert str(model) == str(make())
    assert all(parameter.is_meta for parameter in model.parameters())


CONFIGURATIONS = """
{"vocab_size": 300} => WRONG lm_head.weight is 257 x 32, and 300 x 32 by the configuration
{"intermediate_size": 20} => WRONG model.layers.0.mlp.down_proj.weight is 32 x 48, and 32 x 20 by
{"hidden_act": "nope"} => NONE (KeyError: 'nope')
{"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}} => NONE (KeyError: 'nope')
{"num_attention_heads": 0} => NONE (ZeroDivisionError:
{"num_key_value_heads": 0} => NONE (ZeroDivisionError:
{"num_attention_heads": 3} => The hidden size (32) is not a multiple of the number of attention heads
{"num_hidden_layers": "two"} => Field 'num_hidden_layers' expected int, got str
"""
CONFIGURATIONS = CONFIGURATIONS.replace("WRONG", "its configuration is not that of its weights:")
NONE = "its configuration describes no model that transformers knows"


@pytest.mark.parametrize(("changes", "said"), rows(CONFIGURATIONS.replace("NONE", NONE)))
def test_a_configuration_that_is_no_models(changes, said, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **json.loads(changes))
    source = find_source(str(tmp_path), False)
    with pytest.raises(UsageError, match=f"^--model {tmp_path}: .*{re.escape(said)}"):
        load_model(source, "float32")
    if said.startswith(NONE):  # the code may be the checkpoint's own
        with pytest.raises((LookupError, ArithmeticError)):
            load_model(find_source(str(tmp_path), True), "float32")


@pytest.mark.parametrize("load", [load_tokenizer, load_config, lambda source: load_model(source, "float32")])
def test_it_is_said_once_before_the_hub_is_asked(monkeypatch, capsys, load):
    heard = []

    def unreachable(*_, **__):
        heard.append(capsys.readouterr().err)
        raise OSError("We couldn't connect to it.")

    monkeypatch.setattr(loading, "find_adapter_config_file", unreachable)
    for kind in (loading.AutoConfig, loading.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    output.tell_once.cache_clear()
    with pytest.raises(UsageError):
        load(loading.Source("someone/model", "someone/model", {}))
    assert heard == ["mica: asking the Hugging Face Hub for someone/model: there is no such folder\n", ""]


@pytest.mark.parametrize(
    ("dtype", "said"),
    rows("""
auto => the checkpoint is quantised and computes in bfloat16: this processor has no
bfloat16 => --dtype bfloat16: this processor has no bfloat16 instructions
"""),
)
def test_a_dtype_that_is_kept_has_its_cost_said(monkeypatch, dtype, said):
    monkeypatch.setattr("mica.cli.loading.has_native", lambda dtype: False)
    model = tiny_llama().bfloat16()
    model.is_quantized = dtype == "auto"
    assert suit_processor(model, dtype).startswith(said)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])  # without, and with half of one
def test_a_missing_tokenizer_is_one_line(tmp_path, name):
    tiny_llama().save_pretrained(tmp_path)
    if name == "tokenizer_config.json":
        (tmp_path / name).write_text("{}")
    what = r"its tokenizer cannot be loaded, from tokenizer\.json or tokenizer\.model: .+"
    with pytest.raises(UsageError, match=rf"^--model {tmp_path}: {what}$"):  # . is no line end
        load_tokenizer(find_source(str(tmp_path), False))


def test_a_relative_folder_becomes_absolute(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    with working_in(tmp_path):
        source = find_source("model", False)
        model = load_model(source, "float32")
    assert source.given == "model"
    assert source.location == model.name_or_path == str(tmp_path / "model")


def test_among_several_processes_the_device_is_this_ones(monkeypatch):
    here = find_device()
    monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    assert find_device() == here
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert find_device() == torch.device("meta")


@pytest.mark.slow
def test_libraries_say_nothing_on_the_terminal(tmp_path):
    """What torchao, bitsandbytes and torch log as they are imported would hide the one line of an error."""
    done = start("mica", "inspect", tmp_path, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("mica inspect: error: ")
