"""The model card: valid metadata, only what was measured, and code that runs."""

import contextlib
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

import mica.fast
from mica.cli.adapt import base
from mica.cli.adapt.card import card, hub_name, write_card
from mica.cli.loading import find_source
from tests.support.adapt_results import settings, working_in, write_adapter
from tests.support.tiny_cli import logits, tiny_llama
from tests.support.tiny_gguf import write_tiny_gguf


def summary(**changes) -> dict:
    return {
        "model": "owner/base-1B",
        "adapter": "/home/someone/runs/out",
        "merged": None,
        "dtype": "float32",
        "device": "cpu",
        "steps": 200,
        "training_tokens": 12345,
        "training_seconds": 3600.4,
        "trained_parameters": 1000,
        "total_parameters": 2000000,
        "held_out_tokens": 992,
        "perplexity_before": 20.5,
        "perplexity_after": 10.25,
        "retain_before": 8.0,
        "retain_after": 8.5,
        "sources": [
            {"name": "owner/corpus", "documents": 1234, "tokens": 56789},
            {"name": "/home/someone/secret|place/notes.txt", "documents": None, "tokens": 10},
        ],
        "settings": {
            "model": "owner/base-1B",
            "rank": 16,
            "learning_rate": 5e-4,
            "dropout": 0.05,
            "quantize": None,
        },
        "origins": {"learning_rate": "command line", "dropout": "recipe paper"},
        "processes": 2,
        "versions": {"torch": "2.9", "peft": "0.21"},
    } | changes


def test_metadata_is_what_the_hub_reads():
    read = ModelCard(str(card(summary())))
    data = read.data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "owner/base-1B",
        "peft",
        "text-generation",
    )
    assert data.datasets == ["owner/corpus"]
    assert {"mica", "lora", "continued-pretraining"} == set(data.tags)
    found = {(r.dataset_split, r.metric_name): (r.metric_type, r.metric_value) for r in data.eval_results}
    assert found == {
        ("held-out", "perplexity before training"): ("perplexity", 20.5),
        ("held-out", "perplexity after training"): ("perplexity", 10.25),
        ("retain", "perplexity before training"): ("perplexity", 8.0),
        ("retain", "perplexity after training"): ("perplexity", 8.5),
    }
    again = ModelCardData(**yaml.safe_load(data.to_yaml()))
    assert again.to_dict() == data.to_dict()


def test_text_has_results_data_recipe_and_versions():
    text = card(summary()).text
    for row in (
        "| held out, 992 tokens never trained on | 20.50 | 10.25 |",
        "| to be retained | 8.00 | 8.50 |",
        "| `owner/corpus` | 1,234 | 56,789 |",
        "| `notes.txt` |  | 10 |",
        "| learning rate | 0.0005 | command line |",
        "| dropout | 0.05 | recipe paper |",
        "200 steps in 3,600 s, base in float32, on cpu, 2 processes. torch 2.9, peft 0.21.",
    ):
        assert row in text
    assert "quantize" not in text
    assert "someone" not in str(card(summary()))  # no folder of this machine


def test_what_was_not_measured_is_left_out():
    bare = summary(
        retain_before=None,
        retain_after=None,
        perplexity_after=float("nan"),
        sources=[],
        settings={"rank": 16},
        versions={},
    )
    made = card(bare)
    assert [(r.dataset_split, r.metric_value) for r in made.data.eval_results] == [("held-out", 20.5)]
    assert made.data.datasets is None
    assert "retained" not in made.text
    assert "## Data" not in made.text
    quantised = card(summary(settings={"rank": 16, "quantize": "nf4"})).text
    assert "with the base quantised to nf4" in quantised


@pytest.mark.parametrize(
    ("name", "is_on_hub"),
    [("owner/name", True), ("name", False), ("a/b/c", False), ("/a/b", False), ("./b", False),
     ("../b", False), ("~/b", False), ("data/x.jsonl", False), ("folder/model.gguf", False), (None, False)],
)  # fmt: skip
def test_names_of_the_hub(name, is_on_hub):
    assert (hub_name(name) == name) is (is_on_hub or name is None)


def test_an_existing_folder_is_not_on_the_hub(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with working_in(tmp_path):
        assert hub_name("owner/name") is None
        assert card(summary(model="owner/name")).data.base_model is None


def code_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_backticks_in_a_name_end_no_code():
    text = card(
        summary(model="/home/a`b``c/d`e``", sources=[{"name": "`x", "documents": 1, "tokens": 1}])
    ).text
    assert "An adapter for ``` d`e`` ```, made" in text
    assert "| `` `x `` | 1 | 1 |" in text


@pytest.mark.parametrize("name", ["out", 'a "quote", ```\n```\n and \\n'], ids=["plain", "odd"])
def test_code_of_the_card_runs(model_dir, tmp_path, name):
    base_model = tiny_llama().from_pretrained(model_dir)
    tuned = write_adapter(tmp_path / name, base_model)
    write_card(card(summary(model=str(model_dir), adapter=str(tmp_path / name))), tmp_path / name)
    (code,) = code_of((tmp_path / name / "README.md").read_text())
    names = {}
    with working_in(tmp_path):
        exec(code, names)
    assert (logits(names["model"]) - logits(tuned)).abs().max() == 0
    assert names["tokenizer"]("a")["input_ids"]
    assert (
        'from_pretrained("me/adapter")\n'
        in card(summary(settings={"rank": 16, "push_to_hub": "me/adapter"})).text
    )


def test_code_of_a_gguf_base_runs(tmp_path):
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "tiny.gguf")
    args = settings(model=str(tmp_path / "tiny.gguf"), output=tmp_path / "out", dtype="float32")
    tuned = write_adapter(tmp_path / "out", base.load(args, find_source(args.model, False)))
    text = card(summary(model=args.model, adapter=str(tmp_path / "out"))).text
    auto, base_beside, gguf = code_of(text)
    for place, codes in ((tmp_path, (auto, base_beside, gguf)), (tmp_path / "moved", (auto, base_beside))):
        for code in codes:
            names = {}
            with working_in(place), mica.fast.disabled() if code != auto else contextlib.nullcontext():
                exec(code, names)
            assert (logits(names["model"]) - logits(tuned)).abs().max() < 1e-5
        if place == tmp_path:
            (tmp_path / "moved").mkdir()
            (tmp_path / "out").rename(tmp_path / "moved" / "out")
    pushed = card(summary(model=args.model, settings={"rank": 4, "push_to_hub": "me/adapter"})).text
    assert len(code_of(pushed)) == 2  # base/ is not uploaded
    assert "/base" not in pushed
