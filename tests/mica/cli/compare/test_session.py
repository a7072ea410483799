"""`mica compare` end to end on a tiny model: its page, what fails, what is refused, and going on."""

import json
import math
import os
import shlex
import shutil
from statistics import mean
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mica.cli import main
from mica.cli.adapt.methods import METHODS
from mica.cli.compare import schedule, session, trainings
from mica.cli.record import NAME
from tests.mica.cli.compare.tiny_comparison import RATES, arguments, compare, results, untimed
from tests.support.faults import FULL
from tests.support.tables import rows


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """The folder of a comparison of all methods; not to be changed."""
    folder = tmp_path_factory.mktemp("comparison")
    assert compare(folder, model_dir, folder / "out", "--methods", "dora", "full", *RATES) == 0
    return folder / "out"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def refused(capsys):
    """Asserts that a command that ended with ``status`` was refused in one line, with all ``parts`` in it."""

    def refused(status, *parts):
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if line.startswith("mica compare: error")]
        assert status == 2
        assert [part for part in parts if part not in line] == []

    return refused


def resume(output, *options):
    return main(["compare", "--output", str(output), "--resume", *options])


def chosen(output, method):
    """The results of seeds 0 and 1 at the learning rate that is in the table."""
    found = results(output)
    (second,) = [run for run in found.values() if run["method"] == method and run["seed"] == 1]
    return found[f"2-{method}-{second['rate']:g}-8-0"], second


def test_the_page_and_what_was_measured(finished):
    found = results(finished)
    assert {path.name for path in finished.iterdir()} == {*("settings.json", "runs", "README.md", NAME)}
    phases = [run["phase"] for run in found.values()]
    assert [phases.count(phase) for phase in (1, 2, 3)] == [5, 8, 4]
    sizes = {run["method"]: run["trained_parameters"] for run in found.values() if run["phase"] == 2}
    assert sizes["lora"] < 1.1 * sizes["mica"]
    assert sizes["full"] > 10 * sizes["mica"]
    documents = found["base"]["documents"]
    assert not {*documents["validation"]} & {*documents["test"]}  # rates are chosen by others than are shown
    assert len({*documents["test"]}) >= 3
    text = (finished / "README.md").read_text()
    assert text.splitlines()[0].endswith(" on `text.jsonl`")
    assert f"| MiCA | {sizes['mica']:,} | {chosen(finished, 'mica')[1]['rate']:g} | mean |" in text


@pytest.mark.parametrize("method", METHODS)
def test_the_command_on_the_page_trains_the_method_again(finished, tmp_path, method):
    commands = (finished / "README.md").read_text().split("```sh\n")[1].split("```")[0].splitlines()
    _, *words = shlex.split(commands[[*METHODS].index(method)])
    assert main([*words[:-1], str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["settings"]["method"] == method
    losses = chosen(finished, method)[0]["losses"]
    held_out = [*losses["validation"], *losses["test"]]
    # `mica adapt` weighs blocks by the tokens that are predicted; another seed changes 1e-2
    assert summary["perplexity_after"] == pytest.approx(math.exp(mean(held_out)), rel=1e-3)
    assert summary["retain_after"] == pytest.approx(math.exp(mean(losses["retained"])), rel=1e-3)


def test_a_rate_that_diverges_is_named_and_the_rest_goes_on(model_dir, tmp_path, capsys):
    assert compare(tmp_path, model_dir, tmp_path / "out", "--rates", "mica=1e30") == 0
    line = "mica, learning rate 1e+30, 8 steps, seed 0: diverged: a loss is not finite"
    assert line in capsys.readouterr().err
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Failed\n\n- `2-mica-1e+30-8-0`: diverged" in text
    assert chosen(tmp_path / "out", "mica")[0]["rate"] == 0.05  # those that were given before count on


def test_a_method_that_runs_out_of_memory_is_left_out(model_dir, tmp_path, capsys, monkeypatch):
    """And tried again by --resume, once there is memory."""
    train = trainings.train

    def trained(model, data, args, *more):
        if args.rank == 2:  # LoRA's
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return train(model, data, args, *more)

    output = tmp_path / "out"
    monkeypatch.setattr(trainings, "train", trained)
    assert compare(tmp_path, model_dir, output) == 0
    assert "first steps of lora: out of memory" in capsys.readouterr().err
    text = (output / "README.md").read_text()
    assert "- `1-lora-0.01-4-0`: out of memory" in text
    assert "| LoRA |" not in text
    monkeypatch.undo()
    assert resume(output) == 0
    text = (output / "README.md").read_text()
    assert "| LoRA |" in text
    assert "Failed" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    rows("""
--retain nowhere.txt => --retain nowhere.txt: no such file
--methods mica lore => argument --methods: invalid choice: 'lore'
--rates lore=1 => argument --rates: must be METHOD=RATE,RATE,... with a method of mica
--rates mica=1,zero => argument --rates: must be a number above 0, not 'zero'
--rates full=1e-4 => --rates full: it is not compared: name it in --methods
--rank 64 => --rank 64:
--resume => nothing to continue
--sequence-length 3000 => --sequence-length 3000: the model takes at most 128 tokens
"""),
)
def test_mistakes_are_one_line(model_dir, tmp_path, refused, options, message):
    refused(compare(tmp_path, model_dir, tmp_path / "out", *options.split()), message)
    assert not (tmp_path / "out").exists()  # so that the same command, corrected, is not refused


@pytest.mark.parametrize(
    ("letters", "what"),
    [
        (40, "one training and one held-out block"),
        (300, "32 tokens can be held out, too little for three"),
    ],
)
def test_of_a_short_text_a_smaller_sequence_length_is_named(model_dir, tmp_path, refused, letters, what):
    argv = arguments(tmp_path, model_dir, tmp_path / "out")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "x" * letters}))
    refused(main(argv), "--text: ", what, "more text or a smaller --sequence-length helps")


def test_what_was_measured_is_kept_where_the_budget_does_not_suffice(
    model_dir, tmp_path, refused, monkeypatch
):
    """And used with the budget that the message names; a smaller one is refused again, in no time."""
    argv = arguments(tmp_path, model_dir, tmp_path / "out", "--budget", "0.01")
    del argv[argv.index("--steps") : argv.index("--steps") + 2]
    refused(
        main(argv), "--budget 0.01: too short for 32 steps at each learning rate: --resume --budget 1 goes"
    )
    kept = results(tmp_path / "out")
    assert sorted(kept) == ["1-lora-0.01-4-0", "1-mica-0.02-4-0", "base"]
    done = []

    def stopped(self, planned):
        done.append(planned.phase)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainings.Trainings, "make", stopped)
    refused(resume(tmp_path / "out", "--budget", "0.02"), "--budget 0.02: too short for 32 steps")
    assert resume(tmp_path / "out", "--budget", "60") == 130
    assert done == [2]  # nothing of it is measured again
    assert results(tmp_path / "out") == kept


def test_a_budget_that_is_used_up_shows_what_there_is(model_dir, tmp_path, capsys, monkeypatch):
    """On a machine that becomes slower; and names one in which the rest can be done."""
    make = trainings.Trainings.make

    def slow(self, planned):
        took = {"seconds": 800.0} if planned.phase == 2 else {}
        return make(self, planned) | took

    monkeypatch.setattr(trainings.Trainings, "make", slow)
    monkeypatch.setattr(
        session.time, "time", lambda: 800.0 * len(list((tmp_path / "out" / "runs").glob("2-*")))
    )
    output = tmp_path / "out"
    assert compare(tmp_path, model_dir, output) == 0
    left = f"trainings of this kind left: 1; mica compare --output {output} --resume --budget "
    _, _, rest = capsys.readouterr().err.partition(left)
    assert "| LoRA |" in (output / "README.md").read_text()
    monkeypatch.undo()
    assert resume(output, "--budget", rest.split()[0]) == 0
    assert sum(run["phase"] == 2 for run in results(output).values()) == 4


def test_minutes_are_said_in_seconds():
    run = {"failed": None, "phase": schedule.TRIAL, "seconds": 124.61}
    assert session._said(None, run) == "took 124.6 s"


@pytest.mark.parametrize(
    ("name", "text"), [("2-mica-0.02-8-0", '{"phase": '), ("notes", '{"mine": 1}'), ("base", "[]")]
)
def test_a_file_that_is_no_result_is_one_line(copied, refused, name, text):
    (copied / "runs" / f"{name}.json").write_text(text)
    refused(resume(copied), f"{name}.json", "remove it, and its training is done again")


@pytest.fixture
def stopped(model_dir, tmp_path):
    """Arguments of a comparison that was stopped after the model before all was measured."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Comparison, "next", Mock(side_effect=KeyboardInterrupt))
        assert compare(tmp_path, model, tmp_path / "out") == 130
    return tmp_path / "out"


def test_other_weights_are_refused(stopped, tmp_path, refused):
    """One number of one weight, of which the configuration says nothing."""
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, path, {"format": "pt"})
    refused(resume(stopped), "--model: its content is not what", "begin another comparison")


@pytest.mark.parametrize(("option", "file"), [("--text", "text.jsonl"), ("--retain", "kept.jsonl")])
def test_another_text_is_refused(stopped, tmp_path, refused, option, file):
    """Also where the last document has changed, which is not measured."""
    path = tmp_path / file
    path.write_text(path.read_text()[:-3] + 'z"}')
    refused(resume(stopped), f"{option}: its content is not what", "base.json was measured with")


def test_the_same_model_and_texts_go_on(stopped):
    assert resume(stopped) == 0


@pytest.mark.parametrize("name", ["settings.json", "README.md"])
def test_a_full_disk_is_one_line_and_what_is_missing_is_done_again(
    finished, copied, refused, monkeypatch, name
):
    replace = os.replace

    def full_disk(scratch, path):
        if path.name == name:
            raise FULL
        return replace(scratch, path)

    monkeypatch.setattr(os, "replace", full_disk)
    refused(resume(copied), f"{name}: cannot be written: No space left on device")
    monkeypatch.undo()
    for path in sorted((copied / "runs").glob("[23]*"))[::2]:  # as if it had been killed before these
        path.unlink()
    assert resume(copied) == 0
    assert untimed(copied) == untimed(finished)


@pytest.mark.parametrize("method", ["base", "mica"])
def test_a_stop_says_how_to_go_on(model_dir, tmp_path, capsys, monkeypatch, method):
    """Once anything was measured; before that nothing is left."""
    make = trainings.Trainings.make

    def stopped(self, planned):
        if planned.method == method:
            raise KeyboardInterrupt
        return make(self, planned)

    monkeypatch.setattr(trainings.Trainings, "make", stopped)
    output = tmp_path / "out"
    is_kept = method != "base"
    assert compare(tmp_path, model_dir, output) == 130
    assert output.exists() == is_kept
    said = capsys.readouterr().err
    line = f"mica compare: stopped; mica compare --output {output} --resume goes on\n"
    assert (line in said) == is_kept
    assert "mica compare: the model before all trainings (3 of this kind left) ...\n" in said
    assert ("mica compare: first steps of mica (2 of this kind left) ...\n" in said) == is_kept
