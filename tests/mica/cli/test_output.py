"""Files that are written whole; what else the commands print is tested with them."""

import os

import pytest
from safetensors import SafetensorError

from mica.cli import output
from mica.cli.record import NAME, NotOwnError, Record
from mica.errors import UsageError


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    output.write_text("--json", path, "old")

    def full_disk(scratch):
        assert scratch.read_text() == "new"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "flush", full_disk)

    with pytest.raises(UsageError, match=r"--json .*table.json: cannot be written: No space"):
        output.write_text("--json", path, "new")
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == [NAME, path.name]


def test_files_get_the_mode_of_any_file(tmp_path):
    def save_pretrained(folder):
        (folder / "model").write_text("weights")
        (folder / "model").chmod(0o600)  # as safetensors leaves it

    output.write_folder(tmp_path / "model", save_pretrained, record=Record(tmp_path))
    (tmp_path / "any").touch()
    assert (tmp_path / "model" / "model").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_table_replaces_nothing(tmp_path):
    table = tmp_path / "spectra.json"
    output.write_table(table, {})
    with pytest.raises(UsageError, match=f"^--json {table}: is there already: choose another name"):
        output.write_table(table, {})
    assert os.listdir(tmp_path) == [table.name]


def part(name, error=None):
    """Saves an empty file of that name."""

    def save_pretrained(folder):
        (folder / name).touch()
        if error:
            raise error

    return save_pretrained


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "merged"
    record = Record(tmp_path)
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    for others in ([], ["mine"]):
        parts = part("new"), part("half", full)
        with pytest.raises(UsageError, match=r"merged: cannot be written: I/O .*"):
            output.write_folder(path, *parts, record=record)
        assert path.exists() == bool(others)
        if not others:
            path.mkdir()
            (path / "mine").write_text("mine")
        assert os.listdir(path) == ["mine"]
    (path / output.SCRATCH).mkdir()  # of a command that was killed
    (path / output.SCRATCH / "half").touch()
    output.write_folder(path, part("new"), part("newer"), card="a card", record=record)
    assert sorted(os.listdir(path)) == ["README.md", "mine", "new", "newer"]
    with pytest.raises(NotOwnError, match=f"^{path}/mine is not what mica has written there"):
        output.write_folder(path, part("other"), part("mine"), record=record)
    assert sorted(os.listdir(path)) == ["README.md", "mine", "new", "newer"]


def test_a_folder_for_models_has_a_name_that_libraries_can_open(tmp_path):
    for name in (os.fsdecode(b"\xe9"), os.fsdecode(b"\xe9/run")):
        with pytest.raises(UsageError, match=r"^--output .*\\udce9.*: the libraries that write models need"):
            output.check_folder("--output", tmp_path / name)
    output.check_folder("--output", tmp_path / "é\n")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("déjà vu 😀", "déjà vu 😀"), ("a\nb\x7f\x85", r"a\nb\x7f\x85"), (os.fsdecode(b"\xe9"), r"\udce9")],
)
def test_what_is_odd_in_a_name_is_escaped(name, shown):
    assert output.shown(name) == shown
