"""Whole runs of ``mica adapt``: again, resumed, on top of each other."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from transformers import OPTConfig, OPTForCausalLM

from mica.cli.adapt import checkpoints, session
from mica.cli.adapt.summary import as_text
from mica.cli.record import NAME
from tests.support.adapt_runs import (
    log_of,
    resume,
    same,
    same_weights,
    saved,
    sibling,
    summary,
    unfinished,
    weights,
    write,
)
from tests.support.faults import fill_disk_for
from tests.support.tiny_cli import TEXT, adapt, mica, tiny_llama


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """300 documents, one a line."""
    documents = [{"id": n, "text": TEXT[31 * n : 31 * n + 60 + n]} for n in range(300)]
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", documents)


@pytest.fixture(scope="module")
def paper(model_dir, rows, tmp_path_factory):
    """One run by the paper's recipe with all that can be measured, shared by the tests that read it."""
    output = tmp_path_factory.mktemp("paper") / "run"
    (output.parent / "general.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = "--recipe paper --save-steps 4 --eval-steps 6 --log-steps 3 --retain"
    assert adapt(model_dir, rows, output, options, output.parent / "general.txt") == 0
    return output


def test_what_is_measured_is_written(paper):
    result = summary(paper)
    assert result["perplexity_after"] < 0.9 * result["perplexity_before"]
    assert 1 < result["retain_before"] != result["retain_after"]
    assert log_of(paper)[-1]["eval_retain_perplexity"] == pytest.approx(result["retain_after"])
    assert [path.name for path in paper.glob(".*")] == [NAME]
    card = (paper / "README.md").read_text()
    assert f"{result['perplexity_after']:.2f}" in card
    assert "\nrecipe: paper\n" in card


def test_the_summary_counts_what_was_trained(paper, rows):
    made = summary(paper)
    assert made["training_tokens"] == 12 * 2 * 32
    assert made["tokens_per_second"] == pytest.approx(768 / made["training_seconds"])
    assert made["trained_parameters"] == 2 * 2 * 4 * 32  # in 2 layers A of q_proj and v_proj
    assert made["total_parameters"] > made["trained_parameters"]
    assert sum(made["paths"].values()) == 4
    assert len(made["layers_on_peft_path"]) == made["paths"].get("peft", 0)
    assert made["layers"] == "4 layers: 4 reference"  # where kernels are interpreted
    assert f"layers by path       {made['layers']}\n" in as_text(made)
    risen = "held-out perplexity has risen: try a lower --learning-rate (now 0.02)"
    assert risen not in as_text(made)
    assert as_text(made | {"perplexity_after": 1e9}).endswith(risen)
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    source = {"name": str(rows), "documents": 300, "tokens": len("".join(texts)) + 300, "skipped": 0}
    assert made["sources"] == [source]
    assert made["epochs"] == 12 * 2 / made["blocks"]
    assert made["initialisation_seconds"] > 0
    assert made["dtype"] == "float32"


def test_a_finished_run_replaces_what_it_wrote_last_and_nothing_else(paper, output, refused, capsys):
    shutil.copytree(paper, output)
    page, card = output / "README.md", (paper / "README.md").read_text()
    assert resume(output) == 0
    made, said = summary(paper), capsys.readouterr()
    assert "it stays as it is" not in said.err
    change = f"{made['perplexity_before']:.2f} -> {made['perplexity_after']:.2f}"
    for part in (f"{made['epochs']:.3g} epochs, 768 tokens", "512 of", change, str(output)):
        assert part in said.out
    page.write_text("mine")
    assert resume(output) == 0
    said = f"mica: note: {page} is not what mica has written there: it stays as it is\n"
    assert capsys.readouterr().err.count(said) == 1
    assert page.read_text() == "mine"
    page.unlink()
    (output / "tokenizer.json").write_text("mine")
    said = f"{output}/tokenizer.json is not what mica has written there: move it away; the last complete"
    refused(resume(output), f"--output {output}: the adapter cannot be written: {said}")
    assert same_weights(paper, output)
    (output / "tokenizer.json").unlink()
    assert resume(output) == 0
    assert page.read_text().startswith(card[:100])


def test_run_yaml_repeats_the_run(paper, tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert mica("adapt --config", paper / "run.yaml", "--output", tmp_path / "again") == 0
    assert same_weights(paper, tmp_path / "again")
    said = capsys.readouterr()
    assert "note: " not in said.err
    seen = f"{summary(paper)['epochs']:.3g} epochs"
    assert f"12 steps, 768 tokens, {seen}; 512 trained parameters; 0.00 GiB for weights" in said.out
    assert not list((tmp_path / "elsewhere").iterdir())  # nothing is written outside --output


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_resume_over_other_base_weights_is_refused(paper, model_dir, tmp_path, output, refused):
    """A base that has only been moved goes on, wherever run.yaml says that it is now."""
    base = shutil.copytree(model_dir, tmp_path / "base")
    unfinished(paper, output)
    edit(output / "run.yaml", (str(model_dir), str(base)))
    saved(sibling(tiny_llama()), base)
    refused(resume(output), "checkpoint-8 was written with base_weights ", "(now ", "Put the base of the run")
    shutil.copy(model_dir / "model.safetensors", base)
    assert resume(output) == 0
    assert same_weights(paper, output)


def test_resume_after_run_yaml_was_edited_is_refused(paper, output, refused, capsys):
    unfinished(paper, output)
    changes = [("learning_rate: 0.02", "learning_rate: 0.5"), ("seed: 0", "seed: 1")]
    edit(output / "run.yaml", *changes, ("log_steps: 3", "log_steps: 4"))  # the last may change
    before = checkpoints.folders(output)
    said = "with learning_rate 0.02 (now 0.5), seed 0 (now 1): continuing would be another training run"
    refused(resume(output), "error: --resume: ", said)
    assert checkpoints.folders(output) == before
    edit(output / "run.yaml", *((new, old) for old, new in changes), ("log_steps", "# mine\nlog_steps"))
    assert resume(output) == 0
    note = f"mica: note: {output}/run.yaml is not what mica has written there: it stays as it is\n"
    assert note in capsys.readouterr().err
    assert "# mine" in (output / "run.yaml").read_text()
    assert same_weights(paper, output)


@pytest.mark.parametrize("again", [True, False])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(paper, rows, output, capsys, again):
    """By --resume, or by its first command given again."""
    shutil.copytree(paper / "checkpoint-12", checkpoints.scratch(output) / "checkpoint-4")
    for name in ("run.yaml", NAME):
        shutil.copy(paper / name, output)
    if again:
        assert mica("adapt --config", paper / "run.yaml", "--output", output) == 0
    else:
        assert resume(output) == 0
        assert "has no complete checkpoint yet: the run starts from its begin" in capsys.readouterr().err
    assert same_weights(paper, output)


def test_a_signal_before_the_training_ends_it_at_once(model_dir, rows, output, capsys, monkeypatch):
    """What the user has put into the folder meanwhile stays."""
    before = signal.getsignal(signal.SIGTERM)

    def stopped(number, name=None):
        def start(*_):
            if name is not None:
                (output / name).write_text("mine")
            signal.raise_signal(number)

        monkeypatch.setattr("mica.cli.adapt.adapter.start", start)

    stopped(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        adapt(model_dir, rows, output)
    assert not output.exists()
    stopped(signal.SIGINT, "notes.txt")
    assert adapt(model_dir, rows, output) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "mica adapt: stopped"
    assert os.listdir(output) == ["notes.txt"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_the_training_says_how_to_continue(model_dir, rows, output, capsys, monkeypatch):
    begin = "mica.cli.adapt.callbacks.Hooks.on_step_begin"
    monkeypatch.setattr(begin, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert adapt(model_dir, rows, output) == 128 + signal.SIGTERM
    said = f"Stopped at step 1. To continue: mica adapt --output {output} --resume\n"
    assert said in capsys.readouterr().out
    assert not (output / "summary.json").exists()


def test_an_output_folder_in_the_text_is_no_text(model_dir, tmp_path, output):
    """Beside a text whose name is not UTF-8, which card and run.yaml show."""
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text(TEXT)
    assert adapt(model_dir, tmp_path, output, "--steps 4 --save-steps 2") == 0
    before = weights(output)
    (output / "summary.json").unlink()
    shutil.rmtree(output / "checkpoint-4")
    assert resume(output) == 0
    assert same(before, weights(output))


def test_a_folder_where_another_run_writes_or_has_written_since_the_first_look_is_refused(
    model_dir, rows, output, monkeypatch, refused
):
    exclusive = session.exclusive
    with exclusive(output):
        refused(adapt(model_dir, rows, output), "another command writes to it")

    def later(output):
        output.mkdir()
        (output / "run.yaml").write_text("another run's")
        return exclusive(output)

    monkeypatch.setattr(session, "exclusive", later)
    refused(adapt(model_dir, rows, output), "is not empty: choose another folder, or use --resume")
    assert (output / "run.yaml").read_text() == "another run's"


def test_packing_where_documents_cannot_be_kept_apart(rows, tmp_path, output, refused, capsys):
    """In a model whose positions follow from the attention mask."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=257, num_attention_heads=2, max_position_embeddings=128, **sizes)
    opt = saved(OPTForCausalLM(config), tmp_path / "opt")
    said = "--packing documents: the attention of OPTForCausalLM does not stay"
    refused(adapt(opt, rows, tmp_path / "refused", "--packing documents"), said)
    assert adapt(opt, rows, output, "--steps 3") == 0
    assert "note: packing is stream: the attention of OPTForCausalLM" in capsys.readouterr().err
    assert summary(output)["settings"]["packing"] == "stream"
    assert adapt(opt, rows, tmp_path / "given", "--steps 3 --packing stream") == 0
    assert same_weights(output, tmp_path / "given")


@pytest.mark.parametrize("name", ["summary.json", "README.md"])
def test_what_cannot_be_written_after_the_training_is_said_beside_what_is_there(
    paper, tmp_path, refused, name
):
    output = unfinished(paper, tmp_path / "run", last=12)
    with pytest.MonkeyPatch.context() as patch:
        fill_disk_for(name, patch)
        refused(
            resume(output),
            f"error: --output {output / name}: cannot be written: No space left on device; the last "
            f"complete checkpoint is {output}/checkpoint-12 (--resume continues from it)",
        )
    assert resume(output) == 0
    assert summary(output)["steps"] == 12
    assert same_weights(output, paper)
