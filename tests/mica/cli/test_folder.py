"""One command at a time in an output folder, which is new or empty; a refused command leaves nothing."""

import os

import pytest

from mica.cli import folder, output
from mica.cli.output import SCRATCH
from mica.cli.record import NAME, Record
from mica.errors import UsageError


def test_another_command_is_kept_out(tmp_path):
    with folder.exclusive(tmp_path):
        message = f"--output {tmp_path}: another command writes to it; wait for it or stop it"
        with pytest.raises(UsageError, match=message), folder.exclusive(tmp_path):
            pass
        assert (tmp_path / folder.LOCK).exists()
        (tmp_path / "b").touch()
    assert os.listdir(tmp_path) == ["b"]


def test_folders_that_were_made_and_stay_empty_are_removed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("there", "link", "new", "far/away"):
        with folder.exclusive(tmp_path / name):
            assert (tmp_path / name).is_dir()
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]
    with folder.exclusive(tmp_path / "far" / "away"):
        (tmp_path / "far" / "away" / "file").touch()
    assert (tmp_path / "far" / "away" / "file").exists()


def test_a_lock_that_a_killed_command_has_left_is_nothing(tmp_path):
    (tmp_path / folder.LOCK).touch()
    assert folder.entries(tmp_path) == []
    folder.check_new("--output", tmp_path)
    with folder.exclusive(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["notes.txt", ".hidden"])
def test_a_folder_with_anything_in_it_is_not_new(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"--output {tmp_path}: is not empty: choose another folder"):
        folder.check_new("--output", tmp_path)
    folder.check_new("--output", tmp_path / "new")
    (tmp_path / SCRATCH).mkdir()
    folder.check_new("--output", tmp_path)


@pytest.mark.parametrize("error", [UsageError, KeyboardInterrupt])
def test_what_a_command_wrote_before_an_error_goes_and_nothing_else(tmp_path, error):
    """Neither what was there nor what the user has put there or edited meanwhile."""
    written = Record(tmp_path)

    def write(name, text):
        output.write_text("--output", tmp_path / name, text, written)

    write("before", "an earlier command's")
    shown = {"before": "an earlier command's", "base/mine": "mine", "edited": "mine", "mine": "mine"}

    def refused():
        for name in ("file", "base/model", "runs/a", "edited"):
            write(name, "the command's")
        for name in list(shown)[1:]:
            (tmp_path / name).write_text("mine")
        raise error

    with pytest.raises(error), folder.exclusive(tmp_path), folder.undo_on_error(tmp_path):
        refused()
    left = [path for path in output.files_in(tmp_path) if path.name != NAME]
    assert {path.relative_to(tmp_path).as_posix(): path.read_text() for path in left} == shown
    assert not (tmp_path / "runs").exists()
    with folder.undo_on_error(tmp_path):
        write("file", "the command's")
    assert (tmp_path / "file").exists()
