"""Where a run may begin, and where it may go on."""

import argparse

import pytest

from mica.cli.adapt import folder
from mica.cli.record import NAME
from mica.errors import UsageError

NOT_EMPTY = "is not empty: choose another folder"


def check(path, resume=False):
    folder.check(argparse.Namespace(output=path, resume=resume))


def put(path, content=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize("name", ["notes.txt", "base/README.md", ".hidden", "checkpoint-5/model", "run.yaml"])
def test_a_run_begins_in_an_empty_folder(tmp_path, name):
    check(tmp_path / "new")
    check(tmp_path)
    put(tmp_path / name, "mine")
    with pytest.raises(UsageError, match=f"^--output {tmp_path}: {NOT_EMPTY}"):
        check(tmp_path)


def test_what_a_killed_run_has_left_before_its_first_checkpoint_is_of_no_value(tmp_path):
    for name in ("base/model", "runs/events", ".checkpoint.partial/optimizer.pt", ".0123.partial", NAME):
        put(tmp_path / name)
    put(tmp_path / "run.yaml", f"{folder.HEADER} 0.4")
    check(tmp_path)
    check(tmp_path, resume=True)
    for name in ("notes.txt", "checkpoint-5/model", "summary.json", "merged/model"):
        path = tmp_path / name
        put(path)
        with pytest.raises(UsageError, match=f"{NOT_EMPTY}, or use --resume to continue the run there"):
            check(tmp_path)
        check(tmp_path, resume=True)
        path.unlink()
        if path.parent != tmp_path:
            path.parent.rmdir()


def test_a_run_that_was_killed_as_it_wrote_its_first_file_may_be_given_again(tmp_path):
    put(tmp_path / f"{NAME}.partial")
    check(tmp_path)


def test_resume_of_nothing(tmp_path):
    put(tmp_path / "notes.txt")
    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(UsageError, match=f"^--resume: nothing to continue in {path}: there is no run"):
            check(path, resume=True)
