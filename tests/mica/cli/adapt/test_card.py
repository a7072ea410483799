"""The model card: valid metadata, only what was measured, and code that runs."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from mica.cli.adapt.card import card, hub_name
from tests.support.adapt_runs import working_in, write_adapter
from tests.support.tiny_cli import logits, tiny_llama

SETTINGS = {
    "model": "owner/base-1B",
    "method": "mica",
    "rank": 16,
    "learning_rate": 5e-4,
    "experts": False,
    "held_out_text": ["/home/someone/x"],
}
SUMMARY = {
    "model": "owner/base-1B",
    "adapter": "/home/someone/runs/out",
    "dtype": "float32",
    "device": "cpu",
    "processes": 2,
    "steps": 200,
    "training_tokens": 12345,
    "training_seconds": 3600.4,
    "adapter_step": 200,
    "stopped_by": None,
    "trained_embeddings": 0,
    "trained_parameters": 1000,
    "total_parameters": 2000000,
    "perplexity_before": 20.5,
    "perplexity_after": 10.25,
    "retain_before": 8.0,
    "retain_after": 8.5,
    "sources": [
        {"name": "owner/corpus", "documents": 1234, "tokens": 56789},
        {"name": "/home/someone/secret|notes.txt", "documents": 0, "tokens": 10},
    ],
    "settings": SETTINGS,
    "versions": {"torch": "2.9", "peft": "0.21"},
}


def text_of(**changes) -> str:
    return card(SUMMARY | changes).text


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(str(card(SUMMARY))).data
    assert (data.base_model, data.library_name) == ("owner/base-1B", "peft")
    assert (data.pipeline_tag, data.datasets) == ("text-generation", ["owner/corpus"])
    assert {"mica", "lora", "continued-pretraining"} == set(data.tags)
    again = ModelCardData(**yaml.safe_load(data.to_yaml()))
    assert again.to_dict() == data.to_dict()


def test_text_has_results_data_recipe_and_versions():
    text = text_of()
    for row in (
        "An adapter for `owner/base-1B`, made by continued pretraining",
        "on 12,345 tokens with [MiCA](https://arxiv.org/abs/2604.01694)",
        "`B` holds the 16 left singular vectors",
        "1,000 of 2,000,000 parameters were trained.",
        "| held out, never trained on | 20.50 | 10.25 |\n| to be retained | 8.00 | 8.50 |\n",
        "| --- | --- | --- |\n| `owner/corpus` | 1,234 | 56,789 |\n| `secret\\|notes.txt` | 0 | 10 |\n",
        "```yaml\nmethod: mica\nrank: 16\nlearning_rate: 0.0005\nexperts: false\n```",
        "200 steps in 3,600 s, base in float32, on cpu, 2 processes. torch 2.9, peft 0.21.",
    ):
        assert row in text
    assert 'gguf_file="x.gguf", dtype="float32")\nmodel = PeftModel' in text_of(model="/home/someone/x.gguf")
    assert "quantised" not in text
    assert "The adapter is" not in text
    assert "someone" not in str(card(SUMMARY))  # no folder of this machine
    best = text_of(adapter_step=150, stopped_by="--patience 2: why", settings=SETTINGS | {"keep_best": True})
    assert "The adapter is of step 150, the best of those measured; stopped after step 200 by --pati" in best
    assert "The adapter is of step 200, the last; stopped after step 200 by" in text_of(stopped_by="x")
    assert "retained" not in text_of(retain_before=None)
    assert "with the base quantised to nf4" in text_of(
        settings=SETTINGS | {"quantize": "nf4", "method": "dora"}
    )


@pytest.mark.parametrize("name", ["name", "a/b/c", "./b", "~/b", "data/x.jsonl", None])
def test_names_that_are_not_of_the_hub(name):
    assert hub_name(name) is None


def test_an_existing_folder_is_not_on_the_hub(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with working_in(tmp_path):
        assert card(SUMMARY | {"model": "owner/name"}).data.base_model is None


@pytest.mark.parametrize("name", ["out", 'a "quote"'])
def test_code_of_the_card_runs(model_dir, tmp_path, name):
    tuned = write_adapter(tmp_path / name, tiny_llama().from_pretrained(model_dir))
    text = text_of(model=str(model_dir), adapter=str(tmp_path / name))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    with working_in(tmp_path):
        exec(code, names)
    assert (logits(names["model"]) - logits(tuned)).abs().max() == 0
    assert names["tokenizer"]("a")["input_ids"]
