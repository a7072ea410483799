"""Whole runs of ``mica adapt``: again, resumed, overwritten, on top of each other, on quantised bases."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from mica.cli import main
from mica.cli.adapt import checkpoints, folder, training
from tests.support.adapt_results import poison_solver
from tests.support.tiny_cli import TEXT, adapt, byte_tokenizer, logits


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """300 documents, one a line."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (json.dumps({"id": n, "text": TEXT[31 * n : 31 * n + 60 + n]}) for n in range(300))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def retained(tmp_path_factory):
    path = tmp_path_factory.mktemp("retained") / "general.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def paper(model_dir, rows, retained, tmp_path_factory):
    """One run by the paper's recipe with all that can be measured, shared by the tests that read it."""
    output = tmp_path_factory.mktemp("paper") / "run"
    options = [
        "--recipe",
        "paper",
        "--save-steps",
        4,
        "--eval-steps",
        6,
        "--log-steps",
        3,
        "--retain",
        retained,
    ]
    assert adapt(model_dir, rows, output, *options) == 0
    return output


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_measured_is_written(paper):
    result = summary(paper)
    assert result["perplexity_after"] < result["perplexity_before"]
    assert 1 < result["retain_before"] != result["retain_after"]
    assert (result["recipe"], result["origins"]["dropout"]) == ("paper", "recipe paper")
    with (paper / "curve.csv").open(encoding="utf-8") as file:
        curve = list(csv.DictReader(file))
    assert [row["step"] for row in curve if row["held_out_perplexity"]] == ["0", "6", "12"]
    assert [row["step"] for row in curve if row["loss"]] == ["3", "4", "6", "8", "9", "12"]
    assert float(curve[-1]["retain_perplexity"]) == pytest.approx(result["retain_after"])
    card = (paper / "README.md").read_text(encoding="utf-8")
    assert f"{result['perplexity_after']:.2f}" in card
    assert "recipe paper" in card


def test_run_yaml_repeats_the_run(paper, tmp_path):
    assert main(["adapt", "--config", str(paper / "run.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert same(weights(paper), weights(tmp_path / "again"))


def test_resumed_from_a_checkpoint_it_ends_the_same(paper, tmp_path, monkeypatch):
    """As kill -9 leaves it: a checkpoint that is whole, one that is not, and nothing of the run's end."""
    output = tmp_path / "moved"
    main(["adapt", "--config", str(paper / "run.yaml"), "--output", str(output)])
    for name in ("adapter_model.safetensors", "adapter_config.json", "summary.json", "README.md"):
        (output / name).unlink()
    (output / "checkpoint-12" / checkpoints.MARKER).unlink()
    poison_solver(monkeypatch)
    assert main(["adapt", "--output", str(output), "--resume"]) == 0
    assert same(weights(paper), weights(output))
    before, after = summary(paper), summary(output)
    for name in (
        "training_loss",
        "perplexity_before",
        "perplexity_after",
        "retain_after",
        "steps",
        "sources",
    ):
        assert before[name] == after[name]
    assert (paper / "curve.csv").read_text() == (output / "curve.csv").read_text()


def test_resume_before_the_first_checkpoint_starts_anew(paper, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "run.yaml").write_text((paper / "run.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["adapt", "--output", str(output), "--resume"]) == 0
    assert "has no complete checkpoint yet: the run starts from its beginning" in capsys.readouterr().err
    assert same(weights(paper), weights(output))


def test_resume_of_nothing_is_refused(model_dir, rows, tmp_path, capsys):
    assert adapt(model_dir, rows, tmp_path / "none", "--resume") == 2
    assert f"--resume: nothing to go on from in {tmp_path / 'none'}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_signal_says_how_to_go_on(model_dir, rows, tmp_path, capsys, monkeypatch):
    def interrupted(self, args, state, control, **_):
        if state.global_step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("mica.cli.adapt.callbacks.Watching.on_step_begin", interrupted, raising=False)
    output = tmp_path / "out"
    assert adapt(model_dir, rows, output) == 143
    printed = capsys.readouterr().out
    assert f"Stopped at step 6. To go on: mica adapt --output {output} --resume" in printed
    assert not (output / "summary.json").exists()
    monkeypatch.undo()
    assert main(["adapt", "--output", str(output), "--resume"]) == 0
    assert summary(output)["steps"] == 12


def test_ctrl_c_before_the_training_is_one_line(model_dir, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mica.cli.adapt.session.start", lambda *_: signal.raise_signal(signal.SIGINT))
    assert adapt(model_dir, rows, tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "mica adapt: stopped"
    assert not (tmp_path / "out").exists()


def test_overwrite_leaves_nothing_of_the_run_before(model_dir, rows, tmp_path):
    output = tmp_path / "out"
    assert adapt(model_dir, rows, output, "--merge", "--steps", 2, "--push-to-hub", "") != 0
    assert adapt(model_dir, rows, output, "--merge", "--steps", 2) == 0
    (output / "notes.txt").write_text("mine")
    assert adapt(model_dir, rows, output, "--overwrite", "--steps", 1) == 0
    names = {path.name for path in output.iterdir()}
    assert {"notes.txt", "checkpoint-1", "summary.json"} <= names
    assert not {"merged", "checkpoint-2"} & names


def test_a_refused_run_leaves_the_one_before(model_dir, rows, tmp_path):
    output = tmp_path / "out"
    assert adapt(model_dir, rows, output, "--steps", 1) == 0
    before = weights(output)
    assert adapt(model_dir, rows, output, "--overwrite", "--rank", 17) == 2
    assert same(before, weights(output))


def test_two_runs_do_not_share_a_folder(model_dir, rows, tmp_path, capsys):
    output = tmp_path / "out"
    with folder.held(output):
        assert adapt(model_dir, rows, output) == 2
        assert f"--output {output}: another run writes to it" in capsys.readouterr().err
        assert [path.name for path in output.iterdir()] == [".lock"]
    assert not output.exists()


def test_from_an_adapter(paper, model_dir, rows, tmp_path, monkeypatch):
    poison_solver(monkeypatch)
    argv = ["adapt", "--model", model_dir, "--text", rows, "--output", tmp_path / "out", "--adapter", paper]
    assert main([*map(str, argv), "--sequence-length", "32", "--steps", "2", "--learning-rate", "1e-3"]) == 0
    before, after = weights(paper), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before if "lora_B" in name)
    assert not any(torch.equal(before[name], after[name]) for name in before if "lora_A" in name)
    assert summary(tmp_path / "out")["perplexity_before"] == pytest.approx(summary(paper)["perplexity_after"])
    assert summary(tmp_path / "out")["origins"]["rank"] == "adapter"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_base(kind, model_dir, rows, tmp_path):
    output = tmp_path / "out"
    assert adapt(model_dir, rows, output, "--quantize", kind, "--merge", "--dtype", "float32") == 0
    result = summary(output)
    assert result["perplexity_after"] < result["perplexity_before"]
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    name = "model.layers.0.mlp.up_proj"
    factors = {key.rpartition(".")[0][-6:]: w for key, w in weights(output).items() if f"{name}." in key}
    expected = base.get_submodule(name).weight + factors["lora_B"] @ factors["lora_A"]  # alpha is the rank
    torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=1e-5, atol=1e-6)


def test_an_embedded_base_is_found_again(paper, monkeypatch, tmp_path):
    """The adapter names its base by an absolute path."""
    monkeypatch.chdir(tmp_path)
    assert logits(AutoPeftModelForCausalLM.from_pretrained(paper)).isfinite().all()


@pytest.fixture
def opt_dir(tmp_path):
    """A model whose positions follow from the attention mask: documents cannot be kept apart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=257, num_attention_heads=2, max_position_embeddings=128, **sizes)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    byte_tokenizer().save_pretrained(tmp_path / "opt")
    return tmp_path / "opt"


def test_packing_where_documents_cannot_be_kept_apart(opt_dir, rows, tmp_path, capsys):
    assert adapt(opt_dir, rows, tmp_path / "refused", "--packing", "documents") == 2
    assert "--packing documents: the attention of OPTForCausalLM does not stay" in capsys.readouterr().err
    assert adapt(opt_dir, rows, tmp_path / "out", "--steps", 1) == 0
    assert "note: packing is stream: the attention of OPTForCausalLM" in capsys.readouterr().err
    result = summary(tmp_path / "out")
    assert (result["settings"]["packing"], result["origins"]["packing"]) == ("stream", "the model")


def test_the_summary_is_written_before_the_merge(model_dir, rows, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert adapt(model_dir, rows, tmp_path / "out", "--merge", "--steps", 2) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert summary(tmp_path / "out")["steps"] == 2
    assert weights(tmp_path / "out")


def test_bugs_end_with_their_traceback_and_the_group_is_left(model_dir, rows, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(training, "train", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        adapt(model_dir, rows, tmp_path / "out")
