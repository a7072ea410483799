"""``mica adapt`` end to end on a tiny Llama, in process."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.adapt_runs import summary, weights
from tests.support.tiny_cli import TEXT, adapt, logits


@pytest.fixture(scope="module")
def adapted(model_dir, tmp_path_factory):
    """The output folder of one run with two text files and --merge, shared by the tests that read it."""
    folder = tmp_path_factory.mktemp("adapted")
    texts = [folder / "one.txt", folder / "two.txt"]
    for path in texts:
        path.write_text(TEXT, encoding="utf-8")
    output = folder / "nested" / "output"
    assert adapt(model_dir, texts[0], output, "--text", *texts[1:], "--merge") == 0
    return output


def test_summary(adapted):
    made = summary(adapted)
    assert made["perplexity_after"] < 0.9 * made["perplexity_before"]
    assert made["training_tokens"] == 12 * 2 * 32
    assert made["tokens_per_second"] == pytest.approx(768 / made["training_seconds"])
    # 2 layers, rank 4, lora_A alone: q, k, v, o, gate, up read 32 features, down reads 48
    assert made["trained_parameters"] == 2 * 4 * (6 * 32 + 48)
    assert made["total_parameters"] > made["trained_parameters"]
    assert sum(made["paths"].values()) == 14
    assert len(made["layers_on_peft_path"]) == made["paths"].get("peft", 0)
    assert made["held_out_blocks"] == 14  # 5 % of two files with the same content
    assert made["sources"] == [
        {"name": str(adapted.parents[1] / f"{name}.txt"), "documents": 1, "tokens": 9318, "skipped": 0}
        for name in ("one", "two")
    ]
    assert made["epochs"] == 12 * 2 / made["blocks"]
    assert made["initialisation_seconds"] > 0
    assert made["dtype"] == "float32"


@pytest.fixture
def run(model_dir, text_file, tmp_path):
    """``run(option, ...)`` runs the command and returns its summary."""

    def to_the_end(*options, model=model_dir, output=tmp_path / "out") -> dict:
        assert adapt(model, text_file, output, *options) == 0
        return summary(output)

    return to_the_end


def test_printed_summary(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made, printed = run(), capsys.readouterr().out
    change = f"{made['perplexity_before']:.2f} -> {made['perplexity_after']:.2f}"
    rows = ("initialisation", "0.0866 epochs, 768 tokens", "1,920 of")
    for part in (*rows, change, str(tmp_path / "out")):
        assert part in printed
    assert made["merged"] is None
    assert not (tmp_path / "out" / "merged").exists()
    assert not list((tmp_path / "elsewhere").iterdir())  # nothing is written outside --output


def test_adapter_and_merged_model_agree(adapted, model_dir):
    before = logits(AutoModelForCausalLM.from_pretrained(model_dir))
    assert (agreed(adapted, model_dir) - before).abs().max() > 0.05
    ids = AutoTokenizer.from_pretrained(adapted / "merged")("déjà vu")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(model_dir)("déjà vu")["input_ids"]


def agreed(output: Path, model_dir: Path) -> torch.Tensor:
    """The logits that the adapter and the merged model have."""
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    with_adapter = logits(PeftModel.from_pretrained(base, output))
    merged = logits(AutoModelForCausalLM.from_pretrained(output / "merged"))
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-4)
    return merged


def test_adapted_embedding_is_saved_without_its_base(run, model_dir, tmp_path):
    run("--target-modules", "embed_tokens,q_proj", "--merge", "--steps", 3)
    agreed(tmp_path / "out", model_dir)
    assert all("lora_" in name for name in weights(tmp_path / "out"))
