"""Whole runs by all methods, with embeddings or experts: what is written, resumed, continued, transferred."""

import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mica.cli.adapt import embeddings
from mica.cli.adapt.methods import METHODS
from tests.support.adapt_runs import (
    log_of,
    poison_solver,
    resume,
    same_weights,
    saved,
    sibling,
    summary,
    transfer,
    unfinished,
    weights,
    whole_embeddings,
)
from tests.support.moe_models import BUILDERS
from tests.support.tiny_cli import adapt, logits, tiny_llama
from tests.support.without_mica import logits_without_mica


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 257}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256))


def mixture(kind):
    return BUILDERS[kind](vocab_size=257, max_position_embeddings=128)


class Kind(NamedTuple):
    build: Callable
    method: str
    options: str = "--train-embeddings"

    @property
    def dtype(self):
        return "bfloat16" if self.build is bfloat16 else "float32"


def bfloat16():
    return tiny_llama(tie_word_embeddings=True).bfloat16()


KINDS = {
    "named otherwise": Kind(gpt2, "mica"),
    "bfloat16": Kind(bfloat16, "mica"),
    # Quantised are its layers; stacks of experts, routers and embeddings stay as they are
    "nf4, experts": Kind(partial(mixture, "qwen3_moe"), "mica", "--train-embeddings --quantize nf4"),
    "gpt_oss": Kind(partial(mixture, "gpt_oss"), "mica", ""),  # with biases, its stacks transposed
    "lora": Kind(bfloat16, "lora"),
    "lora, experts": Kind(partial(mixture, "qwen3_moe"), "lora", ""),
    "dora": Kind(gpt2, "dora", "--train-embeddings --dropout 0.1"),
}
SOLD = [kind for kind in KINDS if "--train" in KINDS[kind].options]


@pytest.fixture(scope="module", params=KINDS)
def made(request, text_file, tmp_path_factory):
    """The kind; the folders of the model, of its run: 12 steps, a checkpoint every 4."""
    folder, kind = tmp_path_factory.mktemp("made"), KINDS[request.param]
    base = saved(kind.build(), folder / "base")
    options = f"--dtype {kind.dtype} --save-steps 4 --method {kind.method}"
    assert adapt(base, text_file, folder / "run", options, kind.options) == 0
    return kind, base, folder / "run"


@pytest.mark.parametrize("made", SOLD, indirect=True)
def test_embeddings_that_are_written(made):
    kind, base, run = made
    before, after = AutoModelForCausalLM.from_pretrained(base), whole_embeddings(run)
    found = embeddings.find(before)
    assert after.keys() == found.keys()
    is_tied = len({embedding.weight for embedding in found.values()}) == 1
    assert torch.equal(*after.values()) == is_tied
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        moved = (weight - found[name].weight.float()).abs().max()
        assert 0 < moved <= 12 * 0.002 * 1.1  # a tenth of the rate, in 12 steps
        if kind.dtype == "bfloat16":  # what 16 bits would have swallowed
            assert not torch.equal(weight, weight.bfloat16().float())
    result = summary(run)
    assert result["trained_embeddings"] == 257 * 32 * (1 if is_tied else 2)
    assert result["perplexity_after"] < result["perplexity_before"]
    assert kind.method == "dora" or result["layers_on_peft_path"] == []
    assert f"{result['trained_embeddings']:,} of these are the input and" in (run / "README.md").read_text()
    recorded = yaml.safe_load((run / "run.yaml").read_text())
    assert (recorded["train_embeddings"], recorded["embedding_learning_rate"]) == (True, 0.002)


@pytest.mark.parametrize("made", ["lora", "dora"], indirect=True)
def test_the_adapter_is_plain_and_its_method_named(made):
    kind, _, run = made
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["use_dora"]) == (True, kind.method == "dora")
    assert {weight.dtype for weight in weights(run).values()} == {torch.float32}
    assert "mica" not in config["peft_version"]
    method = METHODS[kind.method]
    assert f"with [{method.title}]({method.paper}). {method.title} adds" in (run / "README.md").read_text()
    assert yaml.safe_load((run / "run.yaml").read_text())["method"] == kind.method
    assert summary(run)["perplexity_after"] < summary(run)["perplexity_before"]


@pytest.mark.slow
@pytest.mark.parametrize("made", SOLD, indirect=True)
def test_plain_peft_gives_its_logits(made, tmp_path):
    kind, base, run = made
    ids = torch.arange(64).view(2, 32)
    (theirs,) = logits_without_mica(tmp_path, ids, (base, run, "peft"))
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run))
    tolerance = 0.1 if kind.dtype == "bfloat16" else 1e-4
    torch.testing.assert_close(theirs, expected, rtol=tolerance, atol=tolerance)


def test_killed_and_resumed_to_the_bit(made, tmp_path, monkeypatch):
    _, _, run = made
    output = unfinished(run, tmp_path / "killed")
    poison_solver(monkeypatch)
    assert resume(output) == 0
    assert same_weights(output, run)
    assert log_of(output) == log_of(run)


def test_an_adapter_goes_on(made, text_file, tmp_path, monkeypatch):
    kind, base, run = made
    poison_solver(monkeypatch)
    options = "--steps 1 --learning-rate 1e-3 --scheduler constant"
    assert adapt(base, text_file, tmp_path / "on", "--adapter", run, options, kind.options) == 0
    first, second = summary(run), summary(tmp_path / "on")
    assert second["settings"]["method"] == kind.method
    if kind.dtype == second["dtype"]:
        assert second["perplexity_before"] == pytest.approx(first["perplexity_after"], rel=1e-6)
    before, after = weights(run), weights(tmp_path / "on")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        moved = (weight - before[name]).abs().max()
        assert (moved > 0) == (kind.method != "mica" or "lora_B" not in name)
        assert moved <= (1.1e-3 if "lora_" in name else 1.1e-4)


def test_transfer_adds_what_training_added(made, tmp_path):
    kind, base, run = made
    chat, out = saved(sibling(kind.build()), tmp_path / "chat"), tmp_path / "out"
    assert transfer(run, chat, out) == 0
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)
    tuned.merge_and_unload().save_pretrained(tmp_path / "by peft")
    says_so = "added to the embeddings is added here too" in (out / "README.md").read_text()
    assert says_so == ("--train-embeddings" in kind.options)
    merged, there, trained, here = (
        weights(folder, "model") for folder in (out, chat, tmp_path / "by peft", base)
    )
    assert merged.keys() == there.keys()
    tolerance = 2e-3 if kind.dtype == "bfloat16" else 1e-6
    for name, weight in merged.items():  # the same update, up to the rounding of the sums
        assert weight.dtype == trained[name].dtype == there[name].dtype
        added, expected = (weight - there[name]).float(), (trained[name] - here[name]).float()
        torch.testing.assert_close(added, expected, rtol=0, atol=tolerance)
