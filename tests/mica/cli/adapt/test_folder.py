"""What may be in the output folder, and what a run may put in the place of an earlier one."""

import json
import os

import pytest

from mica.cli import record
from mica.cli.adapt import folder
from mica.cli.output import files_in
from mica.errors import UsageError


def check(output, *, resume=False, overwrite=False, more=(), **inputs):
    inputs = {"--model": ["hub/model"], **{f"--{name}": [str(given)] for name, given in inputs.items()}}
    folder.check(output, resume=resume, overwrite=overwrite, inputs=inputs, more=more)


@pytest.fixture
def run(tmp_path):
    """The folder of a run, and beside what it has written a file of somebody's."""
    output = tmp_path / "run"
    output.mkdir()
    for name in ("base", "merged", "checkpoint-5"):
        (output / name).mkdir()
        (output / name / "model").write_text("weights")
        record.completed(output, name)
    record.claim(output, "run.yaml", "README.md")
    (output / "run.yaml").write_text("rank: 4")
    (output / "README.md").write_text("card")
    (output / "notes.txt").write_text("mine")
    return output


def names(output):
    return {path.relative_to(output).as_posix() for path in files_in(output)}


@pytest.mark.parametrize("name", ["notes.txt", "base/README.md", ".hidden", "vocab.py", "checkpoint-5/model"])
def test_a_folder_without_a_record_is_nobodys_to_write_to(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(
            UsageError, match=rf"{tmp_path}.* has no mica-run.json, which says what a run has"
        ):
            check(tmp_path, **options)


def test_what_a_killed_run_has_left_before_it_began_is_in_nobodys_way(tmp_path):
    record.claim(tmp_path, "base", begun=False)
    (tmp_path / ".base.partial").mkdir()
    (tmp_path / ".mica-run.lock").touch()
    (tmp_path / ".mica-run.0123").touch()
    check(tmp_path)
    check(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match=r"--resume: nothing to continue in .*: it is empty"):
        check(tmp_path, resume=True)
    with folder.held(tmp_path):
        assert not (tmp_path / ".base.partial").exists()
        assert not (tmp_path / record.FILE).exists()


def test_a_run_is_continued_or_replaced_when_it_is_said(run):
    with pytest.raises(UsageError, match="is not empty: use --resume to continue that run, --overwrite to"):
        check(run)
    check(run, resume=True)
    check(run, overwrite=True)


def test_a_folder_of_another_command_is_not_replaced(tmp_path):
    record.write(tmp_path, record.Record(record.TRANSFER))
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match="mica transfer has written it: choose another folder"):
            check(tmp_path, **options)


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_what_no_run_has_written_is_not_replaced(run, option):
    (run / "summary.json").write_text("mine")
    with pytest.raises(UsageError, match=r"summary.json would be replaced, but mica-run.json does not say"):
        check(run, **{option: True})
    (run / "summary.json").unlink()
    (run / "runs").mkdir()
    check(run, **{option: True})
    with pytest.raises(UsageError, match="runs would be replaced"):
        check(run, **{option: True}, more=["runs"])
    (run / "checkpoint-7").mkdir()
    with pytest.raises(
        UsageError, match="checkpoint-7 does not belong to the run that has written this folder"
    ):
        check(run, **{option: True})


def test_what_somebody_has_put_into_a_folder_of_the_run_stays(run):
    (run / "merged" / "model.gguf").write_text("mine")
    message = "merged/model.gguf is in a folder that the run would replace, and no run has written it"
    with pytest.raises(UsageError, match=message):
        check(run, overwrite=True)
    with pytest.raises(UsageError, match=message):
        check(run, resume=True, more=["merged"])
    check(run, resume=True)


def test_what_somebody_puts_there_while_the_model_is_read_stays(run):
    check(run, overwrite=True)
    (run / "checkpoint-5" / "mine.txt").write_text("mine")
    before = {name: (run / name).read_bytes() for name in names(run)}
    with pytest.raises(UsageError, match=r"checkpoint-5/mine.txt is in a folder that the run would replace"):
        folder.begin(run, "rank: 8", {}, names=[], resume=False)
    assert {name: (run / name).read_bytes() for name in names(run)} == before


def test_overwrite_removes_nothing_that_the_run_reads(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    (run / "mine").mkdir()
    cases = {
        "model": "run/base",
        "adapter": "run/checkpoint-5/x",
        "text": "link/merged",
        "config": "run/run.yaml",
    }
    cases |= {"retain": "run", "held-out-text": "link"}
    for option, given in cases.items():
        with pytest.raises(UsageError) as raised:
            check(run, overwrite=True, **{option: tmp_path / given})
        said = f"--{option} {tmp_path / given}: --overwrite would remove it from --output {run}"
        assert str(raised.value) == said
        check(run, resume=True, **{option: tmp_path / given})
    check(run, overwrite=True, text=run / "mine")
    check(run, overwrite=True, text=run / "notes.txt")
    check(run, overwrite=True, text=tmp_path)  # of which the output folder is left out


def test_a_new_run_in_the_place_of_the_old_one(run):
    folder.begin(run, "rank: 5", {"rank": "default"}, names=["README.md"], resume=False)
    assert names(run) == {"mica-run.json", "run.yaml", "notes.txt"}
    assert (run / "run.yaml").read_text() == "rank: 5"
    found = record.read(run)
    assert found.begun
    assert found.origins == {"rank": "default"}
    assert found.files == {"run.yaml": None}


def test_a_run_that_goes_on_keeps_what_is_there(run):
    before = names(run)
    folder.begin(run, "rank: 5", {}, names=["README.md", "tokenizer.json"], resume=True)
    assert names(run) == before
    assert (run / "run.yaml").read_text() == "rank: 5"


def test_a_converted_base_is_kept_and_the_one_before_goes(run):
    """It is made beside that of the earlier run, which a refused run must leave as it was."""
    record.claim(run, "base", begun=False)
    (run / ".base.partial").mkdir()
    (run / ".base.partial" / "model").write_text("new")
    record.completed(run, "base", run / ".base.partial")
    folder.begin(run, "rank: 5", {}, names=[], resume=False)
    assert (run / "base" / "model").read_text() == "new"
    assert record.read(run).files == {"run.yaml": None, "base": ["model"]}


def test_nothing_has_changed_if_a_new_run_cannot_begin(run, monkeypatch):
    (run / "tokenizer.json").write_text("mine")
    before = names(run)
    with pytest.raises(UsageError, match=r"tokenizer.json would be replaced"):
        folder.begin(run, "rank: 5", {}, names=["tokenizer.json"], resume=False)
    with pytest.raises(UnicodeEncodeError):
        folder.begin(run, "\udce9", {}, names=[], resume=False)
    record.recover(run)
    assert names(run) == before
    assert (run / "run.yaml").read_text() == "rank: 4"


def test_results_are_the_runs_own(run):
    record.claim(run, "adapter_model.safetensors", "runs")
    assert folder.results(run) == ["README.md", "adapter_model.safetensors", "run.yaml"]
    assert folder.results(run / "base") == []


def test_a_run_that_was_refused_leaves_no_record(tmp_path):
    """It has claimed what it would have written."""
    output = tmp_path / "deep" / "out"
    with folder.held(output):
        record.claim(output, "base", begun=False)
    assert not output.parent.exists()


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("there", "link", "new", "far/away"):
        with folder.held(tmp_path / name):
            assert (tmp_path / name).is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
    assert not list((tmp_path / "there").iterdir())


def test_another_run_is_kept_out(tmp_path):
    with folder.held(tmp_path):
        message = f"--output {tmp_path}: another run writes to it; wait for it or stop it"
        with pytest.raises(UsageError, match=message), folder.held(tmp_path):
            pass
        (tmp_path / "b").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_overwrite_that_was_killed_is_undone_before_a_run_goes_on(run, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    before = names(run)
    aside = run / f".mica-run.replaced-{record.read(run).run}"
    aside.mkdir()
    (run / "run.yaml").rename(aside / "run.yaml")  # the first of them all, and then kill -9
    folder.recover(run)
    assert names(run) == before
    monkeypatch.setattr(folder, "held", kill)  # not needed where nothing is half done
    folder.recover(run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove everything")
def test_what_cannot_be_removed_is_said_before_anything_is(run):
    (run / "checkpoint-5").chmod(0o555)
    with pytest.raises(UsageError, match=r"checkpoint-5 cannot be replaced: .*checkpoint-5 is not writable"):
        check(run, overwrite=True)
    (run / "checkpoint-5").chmod(0o755)


def test_the_record_is_text_that_anybody_can_read(run):
    content = json.loads((run / record.FILE).read_text("ascii"))
    assert content["command"] == "mica adapt"
    assert content["files"] == {
        "base": ["model"],
        "merged": ["model"],
        "checkpoint-5": ["model"],
        "run.yaml": None,
        "README.md": None,
    }
