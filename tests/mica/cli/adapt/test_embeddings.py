"""``--train-embeddings``: trained in fp32 at a rate of their own, saved, resumed, merged, transferred."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from mica.cli.adapt import adapter, embeddings, result
from mica.errors import UsageError
from tests.support.adapt_runs import (
    adapter_settings as settings,
)
from tests.support.adapt_runs import (
    edit_json,
    saved,
    summary,
    weights,
    whole_embeddings,
)
from tests.support.processes import ROOT
from tests.support.tables import rows
from tests.support.tiny_cli import adapt, logits, tiny_llama

DEFAULT = {"train_embeddings": True, "embedding_learning_rate": 1e-3}


def test_the_trainer_takes_both_rates(text_file, tmp_path, output):
    """Adam's first step is the rate itself, whatever the gradient."""
    base = saved(tiny_llama(), tmp_path / "base")
    rates = "--learning-rate 1e-3 --train-embeddings --embedding-learning-rate 3e-4"
    assert adapt(base, text_file, output, "--steps 1 --scheduler constant", rates) == 0
    found = embeddings.find(AutoModelForCausalLM.from_pretrained(base))
    for name, weight in whole_embeddings(output).items():
        assert (weight - found[name].weight).abs().max().item() == pytest.approx(3e-4, rel=1e-2)
    lora_A = [weight for key, weight in weights(output).items() if "lora_A" in key]
    assert max(weight.abs().max().item() for weight in lora_A) == pytest.approx(1e-3, rel=1e-2)
    model = adapter.start(tiny_llama(), settings(**DEFAULT))
    without = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(UsageError, match="--optimizer some: cannot give embeddings a learning rate"):
        embeddings.separate(without, model, 0.1, "some")


def test_16_bit_base():
    """The copies are fp32, what they give is of the base's dtype, and its own weights are as they were."""
    model = adapter.start(tiny_llama().to(torch.float16), settings(**DEFAULT))
    assert [weight.dtype for weight in embeddings.trained(model)] == [torch.float32] * 2
    assert (model.dtype, logits(model).dtype) == (torch.float16, torch.float16)
    before = tiny_llama().to(torch.float16)
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-2, atol=1e-2)
    assert torch.equal(model.get_base_model().lm_head.original_module.weight, before.lm_head.weight)


def test_embeddings_that_cannot_be_trained():
    model = tiny_llama()
    with pytest.raises(UsageError, match="lm_head is already fully trained by --train-embeddings; drop one"):
        adapter.check(model, settings(target_modules="q_proj,lm_head", **DEFAULT))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match="--train-embeddings: lm_head is quantised to int8"):
        adapter.check(model, settings(**DEFAULT))


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    rows("""
{"modules_to_save": ["lm_head"]} => {} => replaces whole modules, lm_head, which are not the embeddings of
{"modules_to_save": ["embed_tokens", "norm"]} => {} => norm, which are not the embeddings of
{} => {"tie_word_embeddings": true} => its embeddings are not tied, unlike those of --model
{} => {"vocab_size": 260} => lm_head.weight of 257 x 32, but in --model it has 260 x 32
"""),
)
def test_adapters_of_other_modules(changes, model, message, tmp_path):
    result.save(adapter.start(tiny_llama(), settings(**DEFAULT)), None, tmp_path)
    edit_json(tmp_path / "adapter_config.json", **json.loads(changes))
    with pytest.raises(UsageError, match=f"--adapter {re.escape(str(tmp_path))}: .*{message}"):
        adapter.check(tiny_llama(**json.loads(model)), settings(adapter=tmp_path, **DEFAULT))


def test_the_table_of_the_readme_is_the_committed_run():
    page = (ROOT / "mica/cli/README.md").read_text()
    for kind in ("without", "with"):
        made = summary(ROOT / "bench/results/2026-11-27-embeddings" / kind)
        assert made["settings"].get("train_embeddings", False) == (kind == "with")
        row = "| {trained_parameters:,} | {perplexity_before:.1f} → {perplexity_after:.1f} "
        row += "| {retain_before:.1f} → {retain_after:.1f} |"
        assert f"| {kind} {row.format(**made)}" in page
