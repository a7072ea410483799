"""One command at a time in an output folder, which is new or empty; a refused command leaves nothing."""

import os

import pytest

from mica.cli import folder
from mica.cli.output import SCRATCH
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
def test_what_came_before_an_error_goes_and_what_was_there_stays(tmp_path, error):
    (tmp_path / "mine").mkdir()

    def refused():
        (tmp_path / "file").touch()
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "model").touch()
        (tmp_path / "link").symlink_to(tmp_path / "mine")
        raise error

    with pytest.raises(error), folder.exclusive(tmp_path), folder.undo_on_error(tmp_path):
        refused()
    assert os.listdir(tmp_path) == ["mine"]
    with folder.undo_on_error(tmp_path):
        (tmp_path / "file").touch()
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"]
