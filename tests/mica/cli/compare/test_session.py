"""`mica compare` end to end on a tiny model: its page, what fails, what is refused, and going on."""

import json
import math
import shlex
import shutil
from statistics import mean
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mica.cli.adapt.methods import METHODS
from mica.cli.compare import schedule, session, trainings
from mica.cli.record import NAME
from tests.support.faults import fill_disk_for
from tests.support.tables import rows
from tests.support.tiny_cli import mica

OPTIONS = "--methods mica lora --rates mica=0.02,0.05 lora=0.02 --rank 4 --sequence-length 32 --seeds 2"
DOCUMENTS = [f"{n} times {n} is {n * n}; {n + 1} times {n + 1} is {(n + 1) ** 2}; " for n in range(0, 160, 2)]
KEPT = [f"the quick brown fox jumps over {n} lazy dogs and runs away. " for n in range(12)]


def compare(folder, model, *options, documents=DOCUMENTS, steps="--steps 8") -> int:
    """Run the command in ``folder``: texts are written to it, and `out`; ``options`` come last and win."""
    text, kept = folder / "text.jsonl", folder / "kept.jsonl"
    for path, lines in ((text, documents), (kept, KEPT)):
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    texts = "--text", text, "--retain", kept
    return mica("compare --model", model, *texts, "--output", folder / "out", OPTIONS, steps, *options)


def resume(output, *options) -> int:
    return mica("compare --resume --output", output, *options)


def results(output):
    """What was measured, by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in (output / "runs").glob("*.json")}


def untimed(output):
    """What was measured, and the page, without seconds and folder: what must be the same again."""
    found = results(output)
    for result in found.values():
        for name in [name for name in result if name.endswith("seconds") or name == "ended"]:
            del result[name]
    page = (output / "README.md").read_text().replace(str(output), "output")
    return found, "\n".join(line for line in page.splitlines() if " minutes" not in line)


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """The folder of a comparison of all methods; not to be changed."""
    folder = tmp_path_factory.mktemp("comparison")
    others = "--methods dora full --rates dora=0.02 full=0.002"
    assert compare(folder, model_dir, others) == 0
    return folder / "out"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "copy")


def chosen(output, method):
    """The results of seeds 0 and 1 at the learning rate that is in the table."""
    found = results(output)
    (second,) = [run for run in found.values() if run["method"] == method and run["seed"] == 1]
    return found[f"2-{method}-{second['rate']:g}-8-0"], second


def test_the_page_and_what_was_measured(finished):
    found = results(finished)
    assert {path.name for path in finished.iterdir()} == {"settings.json", "runs", "README.md", NAME}
    phases = [run["phase"] for run in found.values()]
    assert [phases.count(phase) for phase in (1, 2, 3)] == [5, 5, 4]
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
    assert mica(*words[:-1], tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["settings"]["method"] == method
    losses = chosen(finished, method)[0]["losses"]
    held_out = [*losses["validation"], *losses["test"]]
    # `mica adapt` weighs blocks by the tokens that are predicted; another seed changes 1e-2
    assert summary["perplexity_after"] == pytest.approx(math.exp(mean(held_out)), rel=1e-3)
    assert summary["retain_after"] == pytest.approx(math.exp(mean(losses["retained"])), rel=1e-3)


def test_a_rate_that_diverges_is_named_and_the_rest_goes_on(model_dir, tmp_path, output, capsys):
    assert compare(tmp_path, model_dir, "--rates mica=1e30") == 0
    line = "mica, learning rate 1e+30, 8 steps, seed 0: diverged: a loss is not finite"
    assert line in capsys.readouterr().err
    text = (output / "README.md").read_text()
    assert "## Failed\n\n- `2-mica-1e+30-8-0`: diverged" in text
    assert chosen(output, "mica")[0]["rate"] == 0.05  # those that were given before count on


def test_a_method_that_runs_out_of_memory_is_left_out(model_dir, tmp_path, output, capsys, monkeypatch):
    """And tried again by --resume, once there is memory."""
    train = trainings.train

    def trained(model, data, args, *more):
        if args.rank == 2:  # LoRA's
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return train(model, data, args, *more)

    monkeypatch.setattr(trainings, "train", trained)
    assert compare(tmp_path, model_dir) == 0
    assert "first steps of lora: out of memory" in capsys.readouterr().err
    text = (output / "README.md").read_text()
    assert "- `1-lora-0.02-4-0`: out of memory" in text
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
def test_mistakes_are_one_line(model_dir, tmp_path, output, refused, options, message):
    refused(compare(tmp_path, model_dir, options), message)
    assert not output.exists()  # so that the same command, corrected, is not refused


@pytest.mark.parametrize(
    ("letters", "what"),
    rows("""
40 => one training and one held-out block
300 => 32 tokens can be held out, too little for three
"""),
)
def test_of_a_short_text_a_smaller_sequence_length_is_named(model_dir, tmp_path, refused, letters, what):
    status = compare(tmp_path, model_dir, documents=["x" * int(letters)])
    refused(status, "--text: ", what, "more text or a smaller --sequence-length helps")


def test_what_was_measured_is_kept_where_the_budget_does_not_suffice(model_dir, tmp_path, output, refused):
    """A smaller one than the message names is refused again, in no time."""
    status = compare(tmp_path, model_dir, "--budget 0.01", steps="")
    refused(status, "--budget 0.01: too short for 32 steps at each learning rate: --resume --budget ")
    kept = results(output)
    assert sorted(kept) == ["1-lora-0.02-4-0", "1-mica-0.02-4-0", "base"]
    refused(resume(output, "--budget 0.02"), "--budget 0.02: too short for 32 steps")
    assert results(output) == kept


def test_a_budget_that_is_used_up_shows_what_there_is(model_dir, tmp_path, output, capsys, monkeypatch):
    """On a machine that becomes slower; and names one in which the rest can be done."""
    make = trainings.Trainings.make

    def slow(self, planned):
        took = {"seconds": 1100.0} if planned.phase == 2 else {}
        return make(self, planned) | took

    monkeypatch.setattr(trainings.Trainings, "make", slow)
    monkeypatch.setattr(session.time, "time", lambda: 1100.0 * len(list((output / "runs").glob("2-*"))))
    assert compare(tmp_path, model_dir) == 0
    left = f"trainings of this kind left: 1; mica compare --output {output} --resume --budget "
    _, _, rest = capsys.readouterr().err.partition(left)
    assert "| LoRA |" in (output / "README.md").read_text()
    monkeypatch.undo()
    assert resume(output, "--budget", rest.split()[0]) == 0
    assert sum(run["phase"] == 2 for run in results(output).values()) == 3


def test_minutes_are_said_in_seconds():
    run = {"failed": None, "phase": schedule.TRIAL, "seconds": 124.61}
    assert session._said(None, run) == "took 124.6 s"


@pytest.mark.parametrize(
    ("name", "text"),
    rows("""
2-mica-0.02-8-0 => {"phase":
notes => {"mine": 1}
base => []
"""),
)
def test_a_file_that_is_no_result_is_one_line(copied, refused, name, text):
    (copied / "runs" / f"{name}.json").write_text(text)
    refused(resume(copied), f"{name}.json", "remove it, and its training is done again")


@pytest.fixture
def stopped(model_dir, tmp_path, output):
    """Arguments of a comparison that was stopped after the model before all was measured."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Comparison, "next", Mock(side_effect=KeyboardInterrupt))
        assert compare(tmp_path, model) == 130
    return output


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


@pytest.mark.parametrize("name", ["settings.json", "README.md"])
def test_a_full_disk_is_one_line_and_what_is_missing_is_done_again(
    finished, copied, refused, monkeypatch, name
):
    fill_disk_for(name, monkeypatch)
    refused(resume(copied), f"{name}: cannot be written: No space left on device")
    monkeypatch.undo()
    for path in sorted((copied / "runs").glob("[23]*"))[::5]:  # as if it had been killed before these
        path.unlink()
    assert resume(copied) == 0
    assert untimed(copied) == untimed(finished)


@pytest.mark.parametrize("method", ["base", "mica"])
def test_a_stop_says_how_to_go_on(model_dir, tmp_path, output, capsys, monkeypatch, method):
    """Once anything was measured; before that nothing is left."""
    make = trainings.Trainings.make

    def stopped(self, planned):
        if planned.method == method:
            raise KeyboardInterrupt
        return make(self, planned)

    monkeypatch.setattr(trainings.Trainings, "make", stopped)
    is_kept = method != "base"
    assert compare(tmp_path, model_dir) == 130
    assert output.exists() == is_kept
    said = capsys.readouterr().err
    line = f"mica compare: stopped; mica compare --output {output} --resume goes on\n"
    assert (line in said) == is_kept
    assert "mica compare: the model before all trainings (3 of this kind left) ...\n" in said
    assert ("mica compare: first steps of mica (2 of this kind left) ...\n" in said) == is_kept
