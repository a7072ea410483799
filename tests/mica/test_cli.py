"""``mica adapt`` end to end on a tiny Llama, in process, and every way in which it refuses its input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from mica.cli import main
from mica.cli.evaluate import perplexity
from mica.cli.text import pack, spread
from mica.errors import UsageError

TEXT = "".join(f"{n} times {n} is {n * n}; " for n in range(400))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and an EOS, 257 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny_llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes, **heads, **options))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for each other on matrices this small, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def adapt(model, text, output, *options) -> int:
    """Run ``mica adapt`` with settings for the tiny model; ``options`` come last and win."""
    argv = ["adapt", "--model", str(model), "--text", str(text), "--output", str(output)]
    argv += ["--rank", "4", "--steps", "12", "--sequence-length", "32", "--learning-rate", "0.02"]
    return main([*argv, *map(str, options)])


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(64).view(2, 32)).logits


@pytest.fixture(scope="module")
def adapted(model_dir, tmp_path_factory):
    """The output folder of one run with two text files and --merge, shared by the tests that read it."""
    folder = tmp_path_factory.mktemp("adapted")
    texts = [folder / "one.txt", folder / "two.txt"]
    for path in texts:
        path.write_text(TEXT, encoding="utf-8")
    output = folder / "nested" / "output"
    assert adapt(model_dir, texts[0], output, "--text", *texts, "--merge") == 0
    return output


# What a run gives


def test_summary(adapted):
    summary = json.loads((adapted / "summary.json").read_text(encoding="utf-8"))
    assert summary["perplexity_after"] < 0.9 * summary["perplexity_before"]
    assert summary["training_tokens"] == 12 * 2 * 32
    assert summary["tokens_per_second"] == pytest.approx(768 / summary["training_seconds"])
    # 2 layers, rank 4, lora_A alone: q, k, v, o, gate, up read 32 features, down reads 48
    assert summary["trained_parameters"] == 2 * 4 * (6 * 32 + 48)
    assert summary["total_parameters"] > summary["trained_parameters"]
    assert sum(summary["paths"].values()) == 14
    assert len(summary["layers_on_peft_path"]) == summary["paths"].get("peft", 0)
    assert summary["held_out_tokens"] == 32 * 31  # capped at 32 blocks, 31 predicted tokens each
    assert summary["initialisation_seconds"] > 0
    assert summary["peak_memory_bytes"] is None or summary["peak_memory_bytes"] > 2**20
    assert 0 <= summary["merge_swallowed"] <= 1
    assert summary["dtype"] == "float32"


def test_printed_summary(model_dir, text_file, tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert adapt(model_dir, text_file, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert f"{summary['perplexity_before']:.2f} -> {summary['perplexity_after']:.2f}" in printed
    for part in ("initialisation", "12 steps, 768 tokens", "peak memory", "1,920 of", str(tmp_path / "out")):
        assert part in printed
    assert summary["merged"] is None
    assert not (tmp_path / "out" / "merged").exists()
    assert not list((tmp_path / "elsewhere").iterdir())  # nothing is written outside --output


def test_adapter_and_merged_model_agree(adapted, model_dir):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    before = logits(base)
    with_adapter = logits(PeftModel.from_pretrained(base, adapted))
    merged = logits(AutoModelForCausalLM.from_pretrained(adapted / "merged"))
    assert (with_adapter - before).abs().max() > 0.05
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-4)
    ids = AutoTokenizer.from_pretrained(adapted / "merged")("déjà vu")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(model_dir)("déjà vu")["input_ids"]


def test_adapted_embedding_is_saved_without_its_base(model_dir, text_file, tmp_path):
    output = tmp_path / "out"
    assert adapt(model_dir, text_file, output, "--target-modules", "embed_tokens,q_proj", "--merge") == 0
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    with_adapter = logits(PeftModel.from_pretrained(base, output))
    merged = logits(AutoModelForCausalLM.from_pretrained(output / "merged"))
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-4)
    assert all("lora_" in name for name in load_file(output / "adapter_model.safetensors"))


def test_weights_are_safetensors_only(adapted):
    files = {path.relative_to(adapted).as_posix() for path in adapted.rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "merged/model.safetensors", "summary.json"} <= files
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".md", ".jinja"}
    assert not any("checkpoint" in name or "training_args" in name for name in files)


def test_same_seed_same_adapter(model_dir, text_file, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert adapt(model_dir, text_file, tmp_path / name, "--seed", seed, "--steps", 4) == 0
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_options_reach_model_and_training(model_dir, text_file, tmp_path):
    options = ["--dtype", "bfloat16", "--gradient-checkpointing", "--target-modules", "q_proj, down_proj"]
    assert adapt(model_dir, text_file, tmp_path / "out", *options, "--alpha", 8) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["dtype"] == "bfloat16"
    assert summary["perplexity_after"] < summary["perplexity_before"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (4, 8, "mica")


def test_help_needs_no_transformers():
    code = (
        "import sys; from mica.cli import main; status = main(['adapt', '--help']); "
        "print(status, [name for name in ('transformers', 'peft') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 []"
    assert "float32 for GGUF" in " ".join(result.stdout.split())


# Blocks and perplexity


def test_held_out_tokens_are_never_trained_on():
    first, second = list(range(1000)), list(range(2000, 2505))
    train, held_out = pack([first, second], 10, 0.1, separator=-1)
    assert held_out.flatten().tolist() == [*range(900, 1000), *range(2455, 2505)]
    assert train.flatten().tolist() == [*range(900), -1, *range(2000, 2449)]
    assert not set(train.flatten().tolist()) & set(held_out.flatten().tolist())


def test_short_files_are_split_as_one():
    documents = [list(range(start, start + 7)) for start in range(0, 70, 7)]
    train, held_out = pack(documents, 10, 0.2)
    assert train.flatten().tolist() == list(range(60))
    assert held_out.tolist() == [list(range(60, 70))]


def test_least_text_gives_one_block_each():
    train, held_out = pack([list(range(20))], 10, 0.01)
    assert (train.tolist(), held_out.tolist()) == ([list(range(10))], [list(range(10, 20))])
    with pytest.raises(UsageError, match="19 tokens found, 20 needed"):
        pack([list(range(19))], 10, 0.01)


def test_spread_keeps_first_and_last():
    blocks = torch.arange(100).view(50, 2)
    assert spread(blocks, 50) is blocks
    assert spread(blocks, 3)[:, 0].tolist() == [0, 48, 98]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_by_hand(batch_size):
    model = tiny_llama()
    blocks = torch.randint(0, 257, (3, 16), generator=torch.Generator().manual_seed(0))
    total = 0.0
    for block in blocks:  # token by token: p(token | those before it in the block)
        for position in range(1, 16):
            scores = logits_of(model, block[None, :position])[0, -1].double()
            total -= (scores - scores.logsumexp(0))[block[position]].item()
    model.train()
    assert perplexity(model, blocks, batch_size) == pytest.approx(math.exp(total / 45), rel=1e-5)
    assert model.training


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_perplexity_takes_the_loss_in_fp32():
    model = tiny_llama().bfloat16()
    blocks = torch.arange(64).view(2, 32)
    scores = logits_of(model, blocks)[:, :-1].double().log_softmax(-1)
    expected = -scores.gather(-1, blocks[:, 1:, None]).mean()
    assert perplexity(model, blocks, 2) == pytest.approx(expected.exp().item(), rel=1e-6)


# Refusals


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
    assert captured.out == ""
    if quiet:
        assert lines == errors
    for part in parts:
        assert str(part) in errors[0]
    assert not output.is_dir()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rank", "0"),
        ("--rank", "four"),
        ("--steps", "0"),
        ("--steps", "1.5"),
        ("--batch-size", "-1"),
        ("--sequence-length", "1"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "inf"),
        ("--held-out", "0"),
        ("--held-out", "1"),
        ("--warmup-ratio", "1"),
        ("--seed", "-1"),
        ("--dtype", "int4"),
        ("--alpha", "0"),
    ],
)
def test_bad_value(option, value, capsys, tmp_path):
    status = adapt("unused", "unused", tmp_path / "out", f"{option}={value}")
    refused(capsys, status, tmp_path / "out", option, value)


def test_missing_argument_and_unknown_command(capsys, tmp_path):
    refused(capsys, main(["adapt", "--model", "x", "--output", "y"]), tmp_path / "out", "--text")
    assert main(["adopt"]) == 2
    assert capsys.readouterr().err.startswith("mica: error: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("folder", "directory"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
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
    path.write_text("x" * 63)
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
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    status = adapt(remote_code_dir, text_file, tmp_path / "out")
    refused(capsys, status, tmp_path / "out", "custom code", "--trust-remote-code")
    assert not (tmp_path / "mark").exists()
    assert adapt(remote_code_dir, text_file, tmp_path / "out", "--trust-remote-code", "--steps", 1) == 0
    assert (tmp_path / "mark").exists()


def test_output_cannot_be_a_folder(capsys, tmp_path, text_file, model_dir):
    for output in (text_file, text_file / "below", model_dir):
        status = adapt(model_dir, text_file, output)
        refused(capsys, status, tmp_path / "out", f"--output {output}: ")
    assert text_file.read_text(encoding="utf-8") == TEXT


def test_rank_too_large_names_layer(capsys, tmp_path, text_file, model_dir):
    status = adapt(model_dir, text_file, tmp_path / "out", "--rank", 17)  # k_proj and v_proj: 16 x 32
    refused(capsys, status, tmp_path / "out", "17", "_proj", quiet=False)


def test_weight_with_nan_names_layer(capsys, tmp_path, text_file):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status = adapt(tmp_path / "model", text_file, tmp_path / "out")
    refused(capsys, status, tmp_path / "out", "layers.1.mlp.up_proj", quiet=False)


@pytest.mark.parametrize("names", ["nope", "q_proj,nope", "input_layernorm", ","])
def test_target_modules_not_found(names, capsys, tmp_path, text_file, model_dir):
    status = adapt(model_dir, text_file, tmp_path / "out", "--target-modules", names)
    refused(capsys, status, tmp_path / "out", f"--target-modules {names}: ", quiet=False)


def test_blocks_longer_than_the_model_takes(capsys, tmp_path, text_file, model_dir):
    status = adapt(model_dir, text_file, tmp_path / "out", "--sequence-length", 129)
    refused(capsys, status, tmp_path / "out", "--sequence-length 129", "128", quiet=False)


def test_tokenizer_of_another_model(capsys, tmp_path, text_file):
    LlamaForCausalLM(LlamaConfig(**{**tiny_llama().config.to_dict(), "vocab_size": 40})).save_pretrained(
        tmp_path / "model"
    )
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status = adapt(tmp_path / "model", text_file, tmp_path / "out")
    refused(capsys, status, tmp_path / "out", "40 entries", quiet=False)


@pytest.mark.parametrize(("steps", "seen_at"), [(3, 3), (12, 10)])
def test_divergence_saves_nothing(steps, seen_at, capsys, tmp_path, text_file, model_dir):
    status = adapt(model_dir, text_file, tmp_path / "out", "--learning-rate", "1e38", "--steps", steps)
    refused(
        capsys, status, tmp_path / "out", "loss is not finite", f"at or before step {seen_at};", quiet=False
    )


def test_divergence_after_the_last_log_saves_nothing(capsys, tmp_path, text_file, model_dir, monkeypatch):
    def diverge(model, blocks, **options):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)

    monkeypatch.setattr("mica.cli.train.train", diverge)
    status = adapt(model_dir, text_file, tmp_path / "out")
    refused(capsys, status, tmp_path / "out", "perplexity is not finite", quiet=False)


def test_bugs_keep_their_traceback(monkeypatch, tmp_path, text_file, model_dir):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr("mica.cli.train.train", broken)
    with pytest.raises(ValueError, match="a bug"):
        adapt(model_dir, text_file, tmp_path / "out")
