"""``--train-embeddings``: trained in fp32 at a rate of their own, saved, resumed, merged, transferred."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mica.cli import main
from mica.cli.adapt import adapter, embeddings, result
from mica.errors import UsageError
from tests.support.adapt_runs import (
    Process,
    command,
    fresh_state,  # noqa: F401 (a fixture)
    log_of,
    poison_solver,
    resume,
    run,
    run_sharded,
    same,
    saved,
    summary,
    unfinished,
    weights,
)
from tests.support.adapt_runs import (
    adapter_settings as settings,
)
from tests.support.moe_models import BUILDERS
from tests.support.tiny_cli import TEXT, adapt, logits, tiny_llama
from tests.support.without_mica import logits_without_mica

ROOT = Path(__file__).resolve().parents[4]
PREFIX = "base_model.model."
IN, OUT = "model.embed_tokens", "lm_head"


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 257}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256))


MODELS = {
    "untied": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "named otherwise": gpt2,
    "experts": lambda: BUILDERS["qwen3_moe"](vocab_size=257, max_position_embeddings=128),
    "bfloat16": lambda: tiny_llama(tie_word_embeddings=True).bfloat16(),
}
DEFAULT = {"train_embeddings": True, "embedding_learning_rate": 1e-3}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module", params=MODELS)
def made(request, text, tmp_path_factory):
    """The kind, the model's folder and that of its run: 12 steps, a checkpoint every 4, the merged model."""
    folder, kind = tmp_path_factory.mktemp("made"), request.param
    base = saved(MODELS[kind](), folder / "base")
    options = ["--dtype", "bfloat16" if kind == "bfloat16" else "float32", "--save-steps", 4]
    assert adapt(base, text, folder / "run", "--train-embeddings", "--merge", *options) == 0
    return kind, base, folder / "run"


def whole(folder):
    """The embeddings in an adapter's file."""
    found = {key.removeprefix(PREFIX): weight for key, weight in weights(folder).items()}
    return {key.removesuffix(".weight"): weight for key, weight in found.items() if "lora_" not in key}


def test_what_is_written(made):
    kind, base, run = made
    before, after = AutoModelForCausalLM.from_pretrained(base), whole(run)
    found = embeddings.find(before)
    assert after.keys() == found.keys()
    assert len(after) == 2
    is_tied = kind not in ("untied", "experts")
    assert torch.equal(*after.values()) == is_tied
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        assert (
            0 < (weight - found[name].weight.float()).abs().max() <= 12 * 0.002 * 1.1
        )  # a tenth, in 12 steps
    made = summary(run)
    assert made["trained_embeddings"] == 257 * 32 * (1 if is_tied else 2)
    assert made["trained_parameters"] > made["trained_embeddings"]
    assert made["perplexity_after"] < made["perplexity_before"]
    assert made["layers_on_peft_path"] == []
    assert sum(made["paths"].values()) > 0
    recorded = yaml.safe_load((run / "run.yaml").read_text())
    assert (recorded["train_embeddings"], recorded["embedding_learning_rate"]) == (True, 0.002)
    assert f"{made['trained_embeddings']:,} of these are the input and" in (run / "README.md").read_text()
    if kind == "bfloat16":  # what 16 bits would have swallowed
        assert not torch.equal(after[IN], after[IN].bfloat16().float())


@pytest.mark.slow
def test_plain_peft_and_the_merged_model_give_its_logits(made, tmp_path):
    kind, base, run = made
    dtype = AutoModelForCausalLM.from_pretrained(base).dtype
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    both = {name: module.weight for name, module in embeddings.find(merged).items()}
    assert (len({id(weight) for weight in both.values()}) == 1) == (kind not in ("untied", "experts"))
    assert {weight.dtype for weight in weights(run / "merged", "model").values()} == {dtype}
    for name, trained in whole(run).items():
        assert torch.equal(both[name], trained.to(dtype))
    ids = torch.arange(64).view(2, 32)
    (theirs,) = logits_without_mica(tmp_path, ids, (base, run, "peft"))
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run))
    exact = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(theirs, expected, **exact)
    torch.testing.assert_close(logits(merged), expected, **exact)


def test_killed_and_resumed_to_the_bit(made, tmp_path, monkeypatch):
    _, _, run = made
    output = unfinished(run, tmp_path / "killed")
    poison_solver(monkeypatch)
    assert resume(output) == 0
    assert same(weights(output), weights(run))
    assert log_of(output) == log_of(run)


def test_an_adapter_goes_on_with_them(made, text, tmp_path, monkeypatch):
    kind, base, run = made
    poison_solver(monkeypatch)
    argv = ["--model", base, "--text", text, "--output", tmp_path / "on", "--adapter", run]
    argv += ["--sequence-length", 32, "--steps", 1, "--dtype", "auto"]
    assert command(*argv, "--learning-rate", 1e-3, "--scheduler", "constant") == 0
    first, second = summary(run), summary(tmp_path / "on")
    assert second["settings"]["train_embeddings"] is True
    if kind != "bfloat16" or second["dtype"] == "bfloat16":
        assert second["perplexity_before"] == pytest.approx(first["perplexity_after"], rel=1e-6)
    before = whole(run)
    moved = [(after - before[name]).abs().max() for name, after in whole(tmp_path / "on").items()]
    assert all(0 < by <= 1.1e-4 for by in moved)


def test_the_trainer_takes_both_rates(text, tmp_path):
    """Adam's first step is the rate itself, whatever the gradient."""
    base = saved(tiny_llama(), tmp_path / "base")
    options = ["--steps", 1, "--scheduler", "constant", "--learning-rate", "1e-3"]
    options += ["--train-embeddings", "--embedding-learning-rate", "3e-4"]
    assert adapt(base, text, tmp_path / "out", *options) == 0
    found = embeddings.find(AutoModelForCausalLM.from_pretrained(base))
    for name, weight in whole(tmp_path / "out").items():
        assert (weight - found[name].weight).abs().max().item() == pytest.approx(3e-4, rel=1e-2)
    lora_A = [weight for key, weight in weights(tmp_path / "out").items() if "lora_A" in key]
    assert max(weight.abs().max().item() for weight in lora_A) == pytest.approx(1e-3, rel=1e-2)
    model = adapter.start(tiny_llama(), settings(**DEFAULT))
    without = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(UsageError, match="--optimizer some: cannot give embeddings a learning rate"):
        embeddings.separate(without, model, 0.1, "some")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_ddp_and_fsdp2_learn_as_one_and_resume_to_the_bit(kind, tmp_path):
    """The last checkpoint follows an evaluation, which leaves the output layer unsharded."""
    options = {"dtype": "float32", "steps": 4, "save_steps": 2, "eval_steps": 2, "batch_size": 2, **DEFAULT}
    run(settings(output=tmp_path / "alone", **options | {"batch_size": 4}))
    started = Process(run, settings(output=tmp_path / "ddp", **options), count=2, folder=tmp_path)
    assert started.join() == [0, 0], started.errors()
    for output, resumed in (("one", False), ("two", True)):
        args = settings(output=tmp_path / output, resume=resumed, **options)
        started = Process(run_sharded, kind, args, count=2, folder=tmp_path)
        assert started.join() == [0, 0], started.errors()
        if not resumed:
            shutil.copytree(tmp_path / "one", tmp_path / "two")
            shutil.rmtree(tmp_path / "two" / "checkpoint-4")
            (tmp_path / "two" / "adapter_model.safetensors").unlink()
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    alone = whole(tmp_path / "alone")
    for name, module in embeddings.find(tiny_llama()).items():
        moved = (alone[name] - module.weight).abs().mean()
        for other in ("ddp", "one"):
            assert (alone[name] - whole(tmp_path / other)[name]).abs().mean() < 1e-3 * moved


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantised_base(kind, text, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = saved(tiny_llama(), tmp_path / "base")
    options = ["--train-embeddings", "--quantize", kind, "--dtype", "float32", "--merge"]
    assert adapt(base, text, tmp_path / "out", *options) == 0
    merged, trained = weights(tmp_path / "out" / "merged", "model"), whole(tmp_path / "out")
    for name, module in embeddings.find(tiny_llama()).items():
        assert torch.equal(merged[f"{name}.weight"], trained[name])
        assert not torch.equal(trained[name], module.weight)


def test_16_bit_base():
    """The copies are fp32, what they give is of the base's dtype, and its own weights are as they were."""
    model = adapter.start(tiny_llama().to(torch.float16), settings(**DEFAULT))
    assert [weight.dtype for weight in embeddings.trained(model)] == [torch.float32] * 2
    assert (model.dtype, logits(model).dtype) == (torch.float16, torch.float16)
    before = tiny_llama().to(torch.float16)
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-2, atol=1e-2)
    assert torch.equal(model.get_base_model().lm_head.original_module.weight, before.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train-embeddings --target-modules q_proj,lm_head", "lm_head is already fully trained by --train"),
        ("--train-embeddings --adapter ADAPTER", "--adapter does not have it; omit this option"),
    ],
)
def test_refused_before_training(options, message, text, tmp_path, capsys):
    base = saved(tiny_llama(), tmp_path / "base")
    result.save(adapter.start(tiny_llama(), settings()), None, tmp_path / "adapter")
    options = options.replace("ADAPTER", str(tmp_path / "adapter")).split()
    argv = ["--model", base, "--text", text, "--output", tmp_path / "out", "--sequence-length", 32, *options]
    assert command(*argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quantised_embeddings_cannot_be_trained():
    model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match="--train-embeddings: lm_head is quantised to int8"):
        adapter.check(model, settings(**DEFAULT))


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"modules_to_save": [OUT]}, {}, "replaces whole modules, lm_head, which are not the embeddings of"),
        ({"modules_to_save": [IN, OUT, "norm"]}, {}, "norm, which are not the embeddings of"),
        ({}, {"tie_word_embeddings": True}, "its embeddings are not tied, unlike those of --model"),
        ({}, {"vocab_size": 260}, "embed_tokens was trained as 257 x 32, but in --model it has 260 x 32"),
    ],
)
def test_adapters_of_other_modules(changes, model, message, tmp_path):
    result.save(adapter.start(tiny_llama(), settings(**DEFAULT)), None, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=f"--adapter {re.escape(str(tmp_path))}: .*{message}"):
        adapter.check(tiny_llama(**model), settings(adapter=tmp_path, **DEFAULT))


def test_transfer_adds_what_training_added(made, tmp_path, capsys):
    kind, base, run = made
    sibling = MODELS[kind]()
    torch.manual_seed(5)
    for weight in sibling.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    chat = saved(sibling, tmp_path / "chat")
    argv = ["transfer", "--adapter", str(run), "--to", str(chat), "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    assert "added to the embeddings is added here too" in (tmp_path / "out" / "README.md").read_text()
    tolerance = 2e-3 if kind == "bfloat16" else 1e-6
    models = [AutoModelForCausalLM.from_pretrained(at) for at in (tmp_path / "out", chat, base)]
    after, there, here = (embeddings.find(model) for model in models)
    for name, trained in whole(run).items():
        added, expected = after[name].weight - there[name].weight, trained - here[name].weight
        torch.testing.assert_close(added.float(), expected.float(), rtol=0, atol=tolerance)
        assert expected.abs().max() > 0

    if kind == "untied":
        shutil.copytree(run, tmp_path / "alone")
        path = tmp_path / "alone" / "adapter_config.json"
        gone = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
        path.write_text(json.dumps(gone))
        argv[2], argv[-1] = str(tmp_path / "alone"), str(tmp_path / "none")
        assert main(argv) == 2
        said = "alone: the update of its embeddings can only be computed with its base: "
        assert said in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


def test_the_table_of_the_readme_is_the_committed_run():
    page = (ROOT / "mica/cli/README.md").read_text(encoding="utf-8")
    for kind in ("without", "with"):
        made = summary(ROOT / "bench/results/2026-11-27-embeddings" / kind)
        assert made["settings"].get("train_embeddings", False) == (kind == "with")
        row = "| {trained_parameters:,} | {perplexity_before:.1f} → {perplexity_after:.1f} "
        row += "| {retain_before:.1f} → {retain_after:.1f} |"
        assert f"| {kind} {row.format(**made)}" in page
