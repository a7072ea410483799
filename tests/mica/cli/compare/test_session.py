"""`mica compare` end to end on a tiny model: its page, what fails, what is refused, and going on."""

import json
import math
import os
import random
import shlex
import shutil
import signal
import time
from statistics import mean
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mica.cli import main
from mica.cli.compare import page, session, trainings
from mica.cli.record import NAME
from mica.errors import UsageError
from tests.mica.cli.compare.tiny_comparison import RATES, arguments, compare, report, started, untimed


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """The folder of a comparison of all four methods; not to be changed."""
    folder = tmp_path_factory.mktemp("comparison")
    assert compare(folder, model_dir, folder / "out", "--methods", "mica,lora,random,full", *RATES) == 0
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


def test_the_page_and_its_data(finished):
    text = (finished / "README.md").read_text()
    found = report(finished)
    names = {"settings.json", "runs", "compare.json", "README.md", "compare.png", NAME}
    assert {path.name for path in finished.iterdir()} == names
    assert text.startswith("# model")
    assert page.markdown(found, finished) == text
    phases = [run["phase"] for run in found["results"].values()]
    assert [phases.count(phase) for phase in (1, 2, 3, 4)] == [5, 8, 4, 4]
    costs = found["costs"]
    assert costs["lora"]["trained_parameters"] < 1.1 * costs["mica"]["trained_parameters"]
    assert costs["random"]["trained_parameters"] == costs["mica"]["trained_parameters"]
    assert costs["full"]["bytes"] > costs["mica"]["bytes"]
    documents = found["results"]["base"]["documents"]
    assert not {*documents["validation"]} & {
        *documents["test"]
    }  # rates are chosen by others than are reported
    assert len({*documents["test"]}) >= 3


def test_mica_adapt_trains_mica_again(finished, tmp_path):
    found = report(finished)
    (row,) = [row for row in found["methods"] if row["method"] == "mica"]
    _, *words = shlex.split(page.command(found, row))
    assert main([*words[:-1], str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    run = found["results"][f"3-mica-{row['rate']:g}-{row['steps']}-0"]
    (end,) = run["points"]
    held_out = [*end["validation"], *end["test"]]
    retained = [*end["retained"], *end["retained, the rest"]]
    # `mica adapt` weighs blocks by the tokens that are predicted; another seed changes 1e-2
    assert summary["perplexity_after"] == pytest.approx(math.exp(mean(held_out)), rel=1e-3)
    assert summary["retain_after"] == pytest.approx(math.exp(mean(retained)), rel=1e-3)


def test_a_rate_that_diverges_is_named_and_the_rest_goes_on(model_dir, tmp_path, capsys):
    assert compare(tmp_path, model_dir, tmp_path / "out", "--rates", "mica=1e30") == 0
    line = "mica, learning rate 1e+30, 2 steps, seed 0: diverged: a loss is not finite"
    assert line in capsys.readouterr().err
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Failed\n\n- mica, learning rate 1e+30, seed 0: diverged" in text
    rows = {row["method"]: row["rate"] for row in report(tmp_path / "out")["methods"]}
    assert rows["mica"] == 0.05  # those that were given before count on


def test_a_method_that_runs_out_of_memory_is_left_out(model_dir, tmp_path, capsys, monkeypatch):
    """And tried again by --resume, once there is memory."""
    train = trainings.train

    def trained(model, data, args, *more):
        if args.rank == 2:  # LoRA's
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return train(model, data, args, *more)

    output = tmp_path / "out"
    monkeypatch.setattr(trainings, "train", trained)
    assert compare(tmp_path, model_dir, output, "--methods", "mica,random,lora") == 0
    assert "lora, learning rate 0.01, 4 steps, seed 0: out of memory" in capsys.readouterr().err
    line = "- lora, learning rate 0.01, seed 0: out of memory; the method was left out"
    assert line in (output / "README.md").read_text()
    assert {row["method"] for row in report(output)["methods"]} == {"mica", "random"}
    monkeypatch.undo()
    assert resume(output) == 0
    assert "lora" in {row["method"] for row in report(output)["methods"]}
    assert report(output)["failed"] == []


def test_another_error_is_not_taken_for_a_full_memory(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "train", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        compare(tmp_path, model_dir, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--retain nowhere.txt", "--retain nowhere.txt: no such file"),
        ("--methods mica", "argument --methods: must be two or more different methods, not 'mica'"),
        ("--methods mica,lore", "argument --methods: 'lore' is not one of mica, lora, random, full"),
        ("--rates lore=1", "argument --rates: must be METHOD=RATE,RATE,... with a method of mica"),
        ("--rates mica=1,zero", "argument --rates: must be a number above 0, not 'zero'"),
        ("--rates full=1e-4", "--rates full: it is not compared: name it in --methods"),
        ("--rank 64", "--rank 64: "),
        ("--resume", "nothing to continue"),
        ("--sequence-length 3000", "--sequence-length 3000: the model takes at most 128 tokens"),
    ],
)
def test_mistakes_are_one_line(model_dir, tmp_path, refused, options, message):
    refused(compare(tmp_path, model_dir, tmp_path / "out", *options.split()), message)
    assert not (tmp_path / "out").exists()  # so that the same command, corrected, is not refused


def test_a_missing_retained_text_is_one_line(refused):
    status = main(["compare", "--model", "m", "--text", "t", "--output", "o"])
    refused(status, "error: the following arguments are required: --retain")


def test_a_launcher_is_not_needed(model_dir, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(compare(tmp_path, model_dir, tmp_path / "out"), "start it once, without torchrun or accelerate")


def test_a_model_whose_loss_is_not_finite_is_one_line(model_dir, tmp_path, refused):
    broken = shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    refused(compare(tmp_path, broken, tmp_path / "out"), f"{broken}: its loss on these texts is not finite")
    assert not (tmp_path / "out").exists()


def test_after_a_budget_that_was_too_small_the_corrected_command_runs(model_dir, tmp_path, refused):
    argv = arguments(tmp_path, model_dir, tmp_path / "out", "--budget", "0.01")
    del argv[argv.index("--steps") : argv.index("--steps") + 2]
    refused(main(argv), "--budget 0.01: too short here: --budget 1 should do")
    assert not (tmp_path / "out").exists()


def test_a_budget_that_has_passed_leaves_what_is_under_way(model_dir, tmp_path, refused, monkeypatch):
    """On a machine that becomes slower; --resume goes on with another budget."""
    monkeypatch.setattr(session, "_LATEST", 0.0)
    output = tmp_path / "out"
    status = compare(tmp_path, model_dir, output)
    refused(status, f"it ended before a whole training: mica compare --output {output} --resume")
    monkeypatch.undo()
    assert resume(output, "--budget", "60") == 0
    assert json.loads((output / "settings.json").read_text())["budget"] == 60.0
    assert (output / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("2-mica-0.02-2-0", '{"phase": ', "remove it, and its training is done again"),
        ("notes", '{"mine": 1}', "is no result of this comparison"),
        ("base", "[]", "is no result of this comparison"),
        ("1-mica-0.02-4-0", None, "is no result of this comparison"),  # of other texts
    ],
)
def test_a_file_that_is_no_result_is_one_line(copied, refused, name, text, message):
    path = copied / "runs" / f"{name}.json"
    if text is None:
        text = json.dumps(json.loads(path.read_text()) | {"documents": {}})
    path.write_text(text)
    refused(resume(copied), f"{name}.json", message)


@pytest.mark.parametrize("name", ["settings.json", "compare.json", "README.md"])
def test_a_full_disk_is_one_line_and_loses_nothing(finished, copied, refused, monkeypatch, name):
    replace = os.replace

    def full_disk(scratch, path):
        if path.name == name:
            raise OSError(28, "No space left on device")
        return replace(scratch, path)

    monkeypatch.setattr(os, "replace", full_disk)
    refused(resume(copied), f"{name}: cannot be written: No space left on device")
    monkeypatch.undo()
    assert resume(copied) == 0
    assert untimed(copied) == untimed(finished)


@pytest.mark.parametrize("phase", [1, 2])
def test_a_stop_says_how_to_go_on(model_dir, tmp_path, capsys, monkeypatch, phase):
    """Before the first training that is worth something nothing is left."""
    make = trainings.Trainings.make

    def stopped(self, planned, latest):
        if planned.phase == phase:
            raise KeyboardInterrupt
        return make(self, planned, latest)

    monkeypatch.setattr(trainings.Trainings, "make", stopped)
    output = tmp_path / "out"
    assert compare(tmp_path, model_dir, output) == 130
    assert output.exists() == (phase > 1)
    said = capsys.readouterr().err
    line = f"mica compare: stopped; mica compare --output {output} --resume goes on\n"
    assert (line in said) == (phase > 1)
    assert "mica compare: the model, and the first steps of each method: " in said
    assert ("mica compare: short trainings: " in said) == (phase > 1)


def test_a_text_that_is_to_be_retained_and_learned_is_noted(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session.Comparison, "planned", Mock(side_effect=UsageError("so far")))
    assert compare(tmp_path, model_dir, tmp_path / "out", "--text", tmp_path / "kept.jsonl") == 2
    assert "--retain names a text of --text: forgetting is measured on what is" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_same_page(model_dir, tmp_path):
    """kill -9 at random moments."""
    options = ("--methods", "mica,lora,full", "--rates", "full=0.001,0.002")
    argv = arguments(tmp_path, model_dir, tmp_path / "whole", *options)
    whole = started(argv)
    begin = time.monotonic()
    assert whole.wait() == 0, whole.stderr.read()
    seconds = time.monotonic() - begin
    argv[argv.index("--output") + 1] = str(tmp_path / "killed")
    generator = random.Random(os.urandom(8))
    for _ in range(5):
        process = started(argv)
        time.sleep(generator.uniform(0.3, 0.8) * seconds)
        is_begun = any((tmp_path / "killed" / "runs").glob("*.json"))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if is_begun and "--resume" not in argv:
            argv.append("--resume")
    process = started(argv)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


@pytest.mark.slow
def test_on_several_gpus_it_finds_the_same(model_dir, tmp_path, monkeypatch):
    """Two processes on a CPU stand in for them."""
    assert compare(tmp_path, model_dir, tmp_path / "alone") == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert compare(tmp_path, model_dir, tmp_path / "both") == 0
    assert untimed(tmp_path / "both") == untimed(tmp_path / "alone")
    assert {result["jobs"] for result in report(tmp_path / "both")["results"].values()} == {2}
