"""Whole runs with trained embeddings or experts: what is written, resumed, continued and transferred."""

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mica.cli.adapt import embeddings
from tests.support.adapt_runs import (
    command,
    log_of,
    poison_solver,
    resume,
    same,
    saved,
    sibling,
    summary,
    transfer,
    unfinished,
    weights,
    whole_embeddings,
)
from tests.support.moe_models import BUILDERS
from tests.support.tiny_cli import TEXT, adapt, logits, tiny_llama
from tests.support.without_mica import logits_without_mica


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 257}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256))


def mixture(kind):
    return BUILDERS[kind](vocab_size=257, max_position_embeddings=128)


MODELS = {
    "named otherwise": gpt2,
    "bfloat16": lambda: tiny_llama(tie_word_embeddings=True).bfloat16(),
    "qwen3_moe": lambda: mixture("qwen3_moe"),
    "gpt_oss": lambda: mixture("gpt_oss"),  # with biases, its stacks transposed; without --train-embeddings
}
with_embeddings = pytest.mark.parametrize("made", [*MODELS][:-1], indirect=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module", params=MODELS)
def made(request, text, tmp_path_factory):
    """The kind; the folders of the model, of its run: 12 steps, a checkpoint every 4."""
    folder, kind = tmp_path_factory.mktemp("made"), request.param
    base = saved(MODELS[kind](), folder / "base")
    options = ["--dtype", "bfloat16" if kind == "bfloat16" else "float32", "--save-steps", 4]
    if kind != "gpt_oss":
        options.append("--train-embeddings")
    assert adapt(base, text, folder / "run", *options) == 0
    return kind, base, folder / "run"


@with_embeddings
def test_embeddings_that_are_written(made):
    kind, base, run = made
    before, after = AutoModelForCausalLM.from_pretrained(base), whole_embeddings(run)
    found = embeddings.find(before)
    assert after.keys() == found.keys()
    assert len(after) == 2
    is_tied = kind != "qwen3_moe"
    assert torch.equal(*after.values()) == is_tied
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        moved = (weight - found[name].weight.float()).abs().max()
        assert 0 < moved <= 12 * 0.002 * 1.1  # a tenth of the rate, in 12 steps
        if kind == "bfloat16":  # what 16 bits would have swallowed
            assert not torch.equal(weight, weight.bfloat16().float())
    result = summary(run)
    assert result["trained_embeddings"] == 257 * 32 * (1 if is_tied else 2)
    assert result["perplexity_after"] < result["perplexity_before"]
    assert result["layers_on_peft_path"] == []
    assert f"{result['trained_embeddings']:,} of these are the input and" in (run / "README.md").read_text()
    recorded = yaml.safe_load((run / "run.yaml").read_text())
    assert (recorded["train_embeddings"], recorded["embedding_learning_rate"]) == (True, 0.002)


@pytest.mark.slow
@with_embeddings
def test_plain_peft_gives_its_logits(made, tmp_path):
    kind, base, run = made
    ids = torch.arange(64).view(2, 32)
    (theirs,) = logits_without_mica(tmp_path, ids, (base, run, "peft"))
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run))
    tolerance = 0.1 if kind == "bfloat16" else 1e-4
    torch.testing.assert_close(theirs, expected, rtol=tolerance, atol=tolerance)


def test_killed_and_resumed_to_the_bit(made, tmp_path, monkeypatch):
    _, _, run = made
    output = unfinished(run, tmp_path / "killed")
    poison_solver(monkeypatch)
    assert resume(output) == 0
    assert same(weights(output), weights(run))
    assert log_of(output) == log_of(run)


def test_an_adapter_goes_on(made, text, tmp_path, monkeypatch):
    kind, base, run = made
    poison_solver(monkeypatch)
    argv = ["--model", base, "--text", text, "--output", tmp_path / "on", "--adapter", run]
    argv += ["--sequence-length", 32, "--steps", 1, "--dtype", "auto"]
    assert command(*argv, "--learning-rate", 1e-3, "--scheduler", "constant") == 0
    first, second = summary(run), summary(tmp_path / "on")
    if kind != "bfloat16" or second["dtype"] == "bfloat16":
        assert second["perplexity_before"] == pytest.approx(first["perplexity_after"], rel=1e-6)
    before, after = weights(run), weights(tmp_path / "on")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        moved = (weight - before[name]).abs().max()
        assert (moved > 0) == ("lora_B" not in name)
        assert moved <= (1.1e-3 if "lora_" in name else 1.1e-4)


def test_transfer_adds_what_training_added(made, tmp_path):
    kind, base, run = made
    chat, out = saved(sibling(MODELS[kind]()), tmp_path / "chat"), tmp_path / "out"
    assert transfer(run, chat, out) == 0
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)
    tuned.merge_and_unload().save_pretrained(tmp_path / "by peft")
    says_so = "added to the embeddings is added here too" in (out / "README.md").read_text()
    assert says_so == (kind != "gpt_oss")
    merged, there, trained, here = (
        weights(folder, "model") for folder in (out, chat, tmp_path / "by peft", base)
    )
    assert merged.keys() == there.keys()
    tolerance = 2e-3 if kind == "bfloat16" else 1e-6
    for name, weight in merged.items():  # the same update, up to the rounding of the sums
        assert weight.dtype == trained[name].dtype == there[name].dtype
        added, expected = (weight - there[name]).float(), (trained[name] - here[name]).float()
        torch.testing.assert_close(added, expected, rtol=0, atol=tolerance)
