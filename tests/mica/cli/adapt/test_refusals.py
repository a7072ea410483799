"""Every way in which ``mica adapt`` refuses its input: one clear line, status 2, nothing written."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, T5Config

import mica
from mica import cli
from mica.cli.adapt.config import STARTING
from mica.cli.adapt.options import OPTIONS
from tests.support.adapt_runs import edit_json, saved
from tests.support.tables import rows
from tests.support.tiny_cli import TEXT, adapt, byte_tokenizer, tiny_llama


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def refused(refused, capsys, out, text_file, model_dir):
    """``refused(part, ..., options=...)`` runs the command: one line with all parts, nothing in ``out``.

    ``quiet``: the error is the only line; else progress bars of earlier stages came before it.
    """

    def check(*parts, model=model_dir, text=text_file, output=out, options=(), quiet=True):
        capsys.readouterr()
        said = refused(adapt(model, text, output, *options), *parts)
        assert not quiet or said.removeprefix(f"{STARTING}\n").count("\n") == 1
        assert not out.is_dir()

    return check


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mica {mica.__version__}\n"


@pytest.mark.parametrize(
    ("backend", "message"),
    rows("""
cuda => MICA_BACKEND must be one of auto, triton, reference, but it is 'cuda'.
triton => MICA_BACKEND=triton demands Triton kernels, but there are none here: on a CPU
"""),
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backend_that_is_not_available(backend, message, refused, monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", backend)
    monkeypatch.delenv("TRITON_INTERPRET")
    refused(message)


@pytest.mark.parametrize(
    "model",
    ["./nowhere", "nowhere/model.gguf", "nobody/no-such-model", "a/b/c", "~/x", "~no-user-is-called-so"],
)
def test_model_not_found(model, refused):
    unreachable = "no such folder, and the Hub cannot be reached: give a folder"
    reason = unreachable if model.startswith("nobody/") else "no such file or folder"
    refused(f"--model {model}: {reason}", model=model)


def broken_weights(path):
    (saved(tiny_llama(), path) / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"no safetensors")


def pickled_weights(path):
    model = tiny_llama()
    (saved(model, path) / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")


def with_nan(path):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    saved(model, path)


def adapter_of(base, path):
    """As it is saved, and as `mica adapt` leaves it: with a tokenizer."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights="mica", target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(path, save_embedding_layers=False)
    byte_tokenizer().save_pretrained(path)


NOT_CAUSAL = "not a causal language model"


@pytest.mark.parametrize(
    ("name", "make", "message", "quiet"),
    [
        ("fake.gguf", lambda path: path.write_bytes(b"not a GGUF file" * 100), "", False),
        ("empty", Path.mkdir, "is not a checkpoint: it has no config.json", True),
        ("some.txt", lambda path: path.write_text(TEXT), "", True),
        ("broken", broken_weights, "its weights cannot be read: ", False),
        ("pickled", pickled_weights, "", False),
        ("t5", T5Config().save_pretrained, NOT_CAUSAL, True),
        ("bert", BertConfig(architectures=["BertForMaskedLM"]).save_pretrained, NOT_CAUSAL, True),
        ("headless", lambda path: saved(tiny_llama().model, path), NOT_CAUSAL, False),
        ("adapter", lambda path: adapter_of(None, path), "is an adapter, not a model", True),
        ("adapter", lambda path: adapter_of("a/b", path), "is an adapter for a/b, not a model", True),
    ],
)
def test_bad_model(name, make, message, quiet, refused, tmp_path, capsys):
    path = tmp_path / name
    make(path)
    refused(f"--model {path}: ", message, model=path, quiet=quiet)
    if name == "adapter":
        assert cli.main(["inspect", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"mica inspect: error: {path}: {message}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_nan, "layers.1.mlp.up_proj"),
        (lambda path: saved(tiny_llama(vocab_size=40), path), "40 entries"),  # the tokenizer is another's
    ],
)
def test_model_that_is_seen_to_be_bad_once_it_is_loaded(make, message, refused, tmp_path):
    make(tmp_path / "model")
    refused(message, model=tmp_path / "model", quiet=False)


@pytest.fixture
def remote_code(tmp_path, monkeypatch):
    """A checkpoint whose classes are Python files in its folder; importing them leaves a mark."""
    folder = saved(tiny_llama(), tmp_path / "remote")
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own-llama", auto_map=own)
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'mark')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_remote_code_only_with_the_flag(remote_code, refused, tmp_path, out, text_file, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted on the terminal"))
    refused("custom code", "--trust-remote-code", model=remote_code)
    assert not (tmp_path / "mark").exists()
    assert adapt(remote_code, text_file, out, "--trust-remote-code --steps 1") == 0
    assert (tmp_path / "mark").exists()


def test_output_cannot_be_a_folder(refused, text_file, model_dir):
    for output in (text_file, text_file / "below", model_dir):
        refused(f"--output {output}: ", output=output)
    assert text_file.read_text() == TEXT
    if Path("/proc/self").exists():  # its folder looks writable
        refused("--output /proc/mica: ", "cannot be made: No such", output="/proc/mica", quiet=False)
        assert not Path("/proc/mica").exists()


@pytest.mark.parametrize("module", ["accelerate", "yaml"])
def test_missing_library(module, refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else find(name))
    refused(f'training needs {module}: pip install "mica-fast[cli]"')


def test_missing_bitsandbytes(refused, monkeypatch):
    monkeypatch.setattr("mica.cli.adapt.base.is_bitsandbytes_available", lambda: False)
    refused("--quantize nf4: needs bitsandbytes", options=["--quantize nf4"])


# Options that take any string, a bad value of them, and what the message has besides these two
BAD_VALUES = """
model => ./nowhere => no such file or folder
adapter => nowhere => no such folder
text => ./nowhere.txt => no such file or folder
text_field => body => has no column 'body', only text: name one with
dataset_config => small => no source is a dataset on the Hub
held_out_text => ./nowhere.csv => no such file or folder
retain => ./nowhere.parquet => no such file or folder
target_modules => nope => no layer of the model is called 'nope'
target_modules => q_proj,v_porj => no layer of the model is called 'v_porj'; did you mean v_proj?
target_modules => input_layernorm => layers.0.input_layernorm is a LlamaRMSNorm, which cannot be adapted
target_modules => , =>
optimizer => adam_w => adam_w
optimizer => adamw_apex_fused => apex
report_to => tensorbord => tensorbord
output => FILE => exists and is not a folder
config => nowhere.yaml => cannot be read
rank => 17 => model.layers.0.self_attn.k_proj has 16 x 32 weights, so at most 16
sequence_length => 129 => 128
experts =>  => --experts: LlamaForCausalLM has no experts
"""


@pytest.mark.parametrize(("name", "value", "message"), rows(BAD_VALUES))
def test_bad_value(name, value, message, refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps({"text": TEXT[index:]}) for index in range(20))
    path.write_text("".join(f"{line}\n" for line in lines))
    flag, value = OPTIONS[name].flag, value.replace("FILE", __file__)
    start = flag if name == "text_field" else f"{flag} {value}".strip()
    refused(start, message, text=path, options=[flag, value])
