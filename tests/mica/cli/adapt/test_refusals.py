"""Every way in which ``mica adapt`` refuses its input: one clear line, status 2, nothing written."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import mica
from mica.cli import main
from mica.cli.adapt.options import OPTIONS
from tests.support.adapt_results import write_adapter
from tests.support.tiny_cli import TEXT, adapt, byte_tokenizer, tiny_llama


def refused(capsys, status: int, output: Path, *parts, quiet: bool = True) -> None:
    """Status 2, one error line with all ``parts`` in it, nothing in the output folder.

    ``quiet``: the error is the only line; else progress bars of earlier stages came before it.
    """
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.replace("\r", "\n").splitlines()
    errors = [line for line in lines if "error: " in line]
    assert len(errors) == 1, captured.err
    assert errors == lines[-1:]
    assert errors[0].startswith("mica adapt: error: ")
    assert "Traceback" not in captured.err
    if quiet:  # else the lines about the data came before it
        assert captured.out == ""
        assert lines == errors
    for part in parts:
        assert str(part) in errors[0]
    assert not output.is_dir()


def test_missing_argument_and_unknown_command(capsys, tmp_path):
    refused(capsys, main(["adapt", "--model", "x", "--output", "y"]), tmp_path / "out", "--text")
    assert main(["adopt"]) == 2
    assert capsys.readouterr().err.startswith("mica: error: ")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mica {mica.__version__}\n"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "MICA_BACKEND must be one of auto, triton, reference, but it is 'cuda'."),
        (
            "triton",
            "MICA_BACKEND=triton demands Triton kernels, but there are none here: no Triton kernels for",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backend_that_is_not_available(backend, message, capsys, tmp_path, text_file, model_dir, monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", backend)
    monkeypatch.delenv("TRITON_INTERPRET")
    refused(capsys, adapt(model_dir, text_file, tmp_path / "out"), tmp_path / "out", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ("folder", "no file"),
        (b"", "is empty"),
        (b" \n\t\n", "no text in it"),
        (b"caf\xe9 au lait", "not UTF-8 text (at byte 3)"),
    ],
)
def test_bad_text(content, message, capsys, tmp_path, model_dir):
    path = tmp_path / "corpus"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    refused(capsys, adapt(model_dir, path, tmp_path / "out"), tmp_path / "out", "--text", path, message)


def test_too_little_text(capsys, tmp_path, model_dir):
    path = tmp_path / "short.txt"
    path.write_text("x" * 62)  # and the end of the document
    refused(
        capsys, adapt(model_dir, path, tmp_path / "out"), tmp_path / "out", "63 tokens found", "64 needed"
    )


@pytest.mark.parametrize("model", ["./nowhere", "nowhere/model.gguf", "nobody/no-such-model", "a/b/c", "~/x"])
def test_model_not_found(model, capsys, tmp_path, text_file):
    refused(capsys, adapt(model, text_file, tmp_path / "out"), tmp_path / "out", f"--model {model}: ")


def test_model_is_not_a_checkpoint(capsys, tmp_path, text_file):
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"not a GGUF file" * 100)
    empty = tmp_path / "empty"
    empty.mkdir()
    for model in (fake, empty, text_file):
        refused(capsys, adapt(model, text_file, tmp_path / "out"), tmp_path / "out", f"--model {model}: ")


def test_broken_or_pickled_weights(capsys, tmp_path, text_file, model_dir):
    for name in ("broken", "pickled"):
        folder = tmp_path / name
        folder.mkdir()
        for path in model_dir.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"no safetensors")
    torch.save(tiny_llama().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for name in ("broken", "pickled"):
        status = adapt(tmp_path / name, text_file, tmp_path / "out")
        refused(capsys, status, tmp_path / "out", f"--model {tmp_path / name}: ", quiet=False)


@pytest.mark.parametrize("base", ["some/model", None])
def test_an_adapter_is_not_a_model(base, capsys, tmp_path, text_file):
    """As it is saved, and as `mica adapt` leaves it: with a tokenizer."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights="mica", target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    message = (
        "is an adapter, made on some/model, and not a model" if base else "is an adapter, and not a model"
    )
    capsys.readouterr()
    status = adapt(tmp_path / "adapter", text_file, tmp_path / "out")
    refused(capsys, status, tmp_path / "out", f"--model {tmp_path / 'adapter'}: {message}")
    assert main(["inspect", str(tmp_path / "adapter")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"mica inspect: error: {tmp_path / 'adapter'}: {message}")
    assert captured.err.count("\n") == 1


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=257, d_model=8, d_kv=4, d_ff=8, num_layers=1))


def tiny_bert():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=257, **sizes))


def headless_llama():
    return tiny_llama().model


@pytest.mark.parametrize("make", [tiny_t5, tiny_bert, headless_llama])
def test_not_a_causal_language_model(make, capsys, tmp_path, text_file):
    folder = tmp_path / "model"
    make().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    capsys.readouterr()  # the bars of save_pretrained
    status = adapt(folder, text_file, tmp_path / "out")
    parts = (f"--model {folder}: ", "not a causal language model")
    refused(capsys, status, tmp_path / "out", *parts, quiet=make is not headless_llama)


@pytest.fixture
def remote_code_dir(tmp_path):
    """A checkpoint whose classes are Python files in its folder; importing them leaves a mark."""
    folder = tmp_path / "remote"
    model = tiny_llama()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own-llama"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'mark')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_remote_code_only_with_the_flag(remote_code_dir, capsys, tmp_path, text_file, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted on the terminal"))
    status = adapt(remote_code_dir, text_file, tmp_path / "out")
    refused(capsys, status, tmp_path / "out", "custom code", "--trust-remote-code")
    assert not (tmp_path / "mark").exists()
    assert adapt(remote_code_dir, text_file, tmp_path / "out", "--trust-remote-code", "--steps", 1) == 0
    assert (tmp_path / "mark").exists()


def test_custom_code_that_needs_weights_is_checked_once_they_are_there(
    remote_code_dir, capsys, tmp_path, text_file, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = (remote_code_dir / "own.py").read_text()
    code += (
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.scale = float(self.lm_head.weight.detach().sum())\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, *args, **kwargs):\n"
        "        return LlamaForCausalLM.from_pretrained(*args, **kwargs)\n"
    )
    (remote_code_dir / "own.py").write_text(code)
    status = adapt(remote_code_dir, text_file, tmp_path / "out", "--trust-remote-code", "--rank", 17)
    refused(capsys, status, tmp_path / "out", "--rank 17: ", "at most 16", quiet=False)


def test_output_cannot_be_a_folder(capsys, tmp_path, text_file, model_dir):
    for output in (text_file, text_file / "below", model_dir):
        status = adapt(model_dir, text_file, output)
        refused(capsys, status, tmp_path / "out", f"--output {output}: ")
    assert text_file.read_text(encoding="utf-8") == TEXT


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_output_that_cannot_be_made(capsys, tmp_path, text_file, model_dir):
    """Though its folder looks writable."""
    status = adapt(model_dir, text_file, "/proc/mica")
    refused(
        capsys, status, Path("/proc/mica"), "--output /proc/mica: ", "cannot be made: No such", quiet=False
    )


def test_rank_too_large_names_layer(capsys, tmp_path, text_file, model_dir):
    status = adapt(model_dir, text_file, tmp_path / "out", "--rank", 17)  # k_proj and v_proj: 16 x 32
    parts = ("--rank 17: model.layers.0.self_attn.k_proj has 16 x 32 weights", "at most 16")
    refused(capsys, status, tmp_path / "out", *parts)


def test_weight_with_nan_names_layer(capsys, tmp_path, text_file):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status = adapt(tmp_path / "model", text_file, tmp_path / "out")
    refused(capsys, status, tmp_path / "out", "layers.1.mlp.up_proj", quiet=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nope", "no layer of the model is called 'nope'"),
        ("q_proj,v_porj", "no layer of the model is called 'v_porj', did you mean 'v_proj'?"),
        ("input_layernorm", "model.layers.0.input_layernorm is a LlamaRMSNorm, which cannot be adapted"),
        (",", ""),
    ],
)
def test_target_modules_not_found(names, message, capsys, tmp_path, text_file, model_dir):
    status = adapt(model_dir, text_file, tmp_path / "out", "--target-modules", names)
    refused(capsys, status, tmp_path / "out", f"--target-modules {names}: {message}")


@pytest.mark.parametrize("module", ["accelerate", "datasets", "matplotlib", "yaml"])
def test_missing_library(module, capsys, tmp_path, text_file, model_dir, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else find(name))
    status = adapt(model_dir, text_file, tmp_path / "out")
    refused(capsys, status, tmp_path / "out", f"training needs {module}: pip install 'mica-fast[cli]'")


def test_missing_bitsandbytes(capsys, tmp_path, text_file, model_dir, monkeypatch):
    monkeypatch.setattr("mica.cli.adapt.base.is_bitsandbytes_available", lambda: False)
    status = adapt(model_dir, text_file, tmp_path / "out", "--quantize", "nf4")
    refused(capsys, status, tmp_path / "out", "--quantize nf4: needs bitsandbytes")


def test_adapter_of_another_model(capsys, tmp_path, text_file, model_dir):
    write_adapter(tmp_path / "adapter", tiny_llama(intermediate_size=40))
    status = adapt(model_dir, text_file, tmp_path / "out", "--adapter", tmp_path / "adapter")
    parts = ("adapts model.layers.0.mlp.down_proj as a layer of 32 x 40", "it has 32 x 48")
    refused(capsys, status, tmp_path / "out", f"--adapter {tmp_path / 'adapter'}: ", *parts)


def test_blocks_longer_than_the_model_takes(capsys, tmp_path, text_file, model_dir):
    status = adapt(model_dir, text_file, tmp_path / "out", "--sequence-length", 129)
    refused(capsys, status, tmp_path / "out", "--sequence-length 129", "128")


def test_tokenizer_of_another_model(capsys, tmp_path, text_file):
    LlamaForCausalLM(LlamaConfig(**{**tiny_llama().config.to_dict(), "vocab_size": 40})).save_pretrained(
        tmp_path / "model"
    )
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status = adapt(tmp_path / "model", text_file, tmp_path / "out")
    refused(capsys, status, tmp_path / "out", "40 entries", quiet=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 3], "a trained weight is not finite after step 3; nothing was saved"),
        (["--steps", 12, "--log-steps", 2], "not finite (nan) at or before step 4; nothing was saved"),
        (
            ["--steps", 12, "--save-steps", 3],
            "a trained weight is not finite after step 3; nothing was saved",
        ),
    ],
)
def test_divergence_leaves_no_adapter(options, message, capsys, tmp_path, text_file, model_dir):
    status = adapt(model_dir, text_file, tmp_path / "out", "--learning-rate", "1e30", *options)
    assert not list((tmp_path / "out").glob("adapter*"))
    assert not list((tmp_path / "out").glob("checkpoint-*/complete.json"))
    shutil.rmtree(tmp_path / "out")
    refused(capsys, status, tmp_path / "out", message, "(now 1e+30)", quiet=False)


# A bad value of each option that takes any string, and what the message has besides the option and the value.
BAD_STRINGS = {
    "model": ("./nowhere", "no such file or folder"),
    "adapter": ("nowhere", "no such folder"),
    "text": ("./nowhere.txt", "no such file or folder"),
    "text_field": ("body", "has no column 'body', but text: name one by"),
    "dataset_config": ("small", "no source is a dataset on the Hub"),
    "held_out_text": ("./nowhere.csv", "no such file or folder"),
    "retain": ("./nowhere.parquet", "no such file or folder"),
    "target_modules": ("nope", "no layer of the model is called 'nope'"),
    "optimizer": ("adam_w", "adam_w"),
    "report_to": ("tensorbord", "tensorbord"),
    "output": (__file__, "exists and is not a folder"),
    "push_to_hub": ("a/b/c", "a/b/c"),
    "config": ("nowhere.yaml", "cannot be read"),
}


def test_every_option_that_takes_any_string_is_here():
    strings = {name for name, option in OPTIONS.items() if option.parse in (str, Path) and not option.choices}
    assert strings == BAD_STRINGS.keys()


@pytest.mark.parametrize("name", BAD_STRINGS)
def test_bad_string(name, capsys, tmp_path, model_dir):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": TEXT[index:]}) + "\n" for index in range(20)), encoding="utf-8"
    )
    value, message = BAD_STRINGS[name]
    status = adapt(model_dir, rows, tmp_path / "out", OPTIONS[name].flag, value)
    refused(capsys, status, tmp_path / "out", OPTIONS[name].flag, value, message)


def test_an_output_with_something_in_it(capsys, tmp_path, model_dir, text_file):
    output = tmp_path / "out"
    output.mkdir()
    (output / "adapter_config.json").write_text("{}")
    assert adapt(model_dir, text_file, output) == 2
    assert (
        "has something in it: go on with that run by --resume, replace it by --overwrite"
        in capsys.readouterr().err
    )
    assert [path.name for path in output.iterdir()] == ["adapter_config.json"]


def test_bugs_keep_their_traceback(monkeypatch, tmp_path, text_file, model_dir):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr("mica.cli.adapt.training.train", broken)
    with pytest.raises(ValueError, match="a bug"):
        adapt(model_dir, text_file, tmp_path / "out")
