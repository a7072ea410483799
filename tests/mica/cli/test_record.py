"""What a record says a run has written, and that nothing else is removed, whenever a process is killed."""

import json
import os
from pathlib import Path

import pytest

from mica.cli import record
from mica.cli.output import files_in
from mica.errors import UsageError


class Killed(BaseException):
    """kill -9: nothing runs afterwards."""


def made(output, **files):
    """A run's folder with ``files``, of which the record knows."""
    output.mkdir(exist_ok=True)
    record.claim(output, *files)
    for name, content in files.items():
        (output / name).write_text(content)
    return output


def contents(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files_in(output)}


def test_a_name_is_on_the_disk_before_the_thing_is_made(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(record, "flush", lambda path: flushed.append((path.name, record.read(tmp_path))))
    record.claim(tmp_path, "a")
    assert record.read(tmp_path).files == {"a": None}
    assert [name for name, _ in flushed] == [".mica-run.json", tmp_path.name]
    assert flushed[0][1] is None  # the new record was whole before it was one
    record.claim(tmp_path, "a")
    assert len(flushed) == 2


@pytest.mark.parametrize("name", ["a", ".a.partial", ".a.old"])
@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_what_is_there_is_not_claimed(tmp_path, name, kind):
    if kind == "file":
        (tmp_path / name).touch()
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(UsageError, match=f"{name} would be replaced, but mica-run.json does not say"):
        record.claim(tmp_path, "a")
    assert record.read(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "more": 1}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"a": "bc"}}',
        '{"format": 1, "files": {"a": [1]}}',
        '{"format": 1, "run": 3}',
        '{"format": 1, "origins": []}',
        '{"format": 1, "origins": {"rank": 3}}',
        *(json.dumps({"format": 1, "files": {name: None}}) for name in ("..", ".", "", "/etc", "a/b")),
        "[" * 100_000,
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path, text):
    (tmp_path / record.FILE).write_text(text)
    with pytest.raises(
        UsageError, match=r"mica-run.json, which says .* cannot be read \(.*choose another folder"
    ):
        record.read(tmp_path)


@pytest.mark.parametrize(
    "name", [os.fsdecode(b"caf\xe9"), "a\x85b", "a\x7fb", "a\nb", "-a", "a: b # c", "😀"]
)
def test_any_name(tmp_path, name):
    record.claim(tmp_path, name)
    assert record.read(tmp_path).files == {name: None}
    assert (tmp_path / record.FILE).read_text("ascii")


def test_a_file_that_somebody_has_put_into_a_folder_is_found(tmp_path):
    (tmp_path / "merged" / "sub").mkdir(parents=True)
    (tmp_path / "merged" / "sub" / "a").touch()
    record.completed(tmp_path, "merged")
    found = record.read(tmp_path)
    assert found.files == {"merged": ["sub/a"]}
    assert record.stranger(tmp_path, found, found.files) is None
    (tmp_path / "merged" / "sub" / "link").symlink_to(tmp_path)
    assert record.stranger(tmp_path, found, found.files) == tmp_path / "merged" / "sub" / "link"


def test_a_checkpoint_that_was_put_back_is_the_runs(tmp_path):
    record.claim(tmp_path, "a")
    run = record.read(tmp_path).run
    for name, owner in (("checkpoint-1", run), ("checkpoint-2", "another")):
        (tmp_path / name).mkdir()
        (tmp_path / name / record.MARKER).write_text(json.dumps({"run": owner, "files": {"x": 1}}))
    found = record.read(tmp_path)
    assert found.files == {"a": None, "checkpoint-1": ["x", record.MARKER]}
    assert record.others(tmp_path, found) == ["checkpoint-2"]


def test_what_is_read_is_found_in_what_is_removed(tmp_path):
    """By the folder, by a link, by a link in a folder, and where it is the output folder itself."""
    output = made(tmp_path / "out", model="weights")
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(output)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "file").symlink_to(output / "model")
    (output / "mine").touch()
    (output / "base").mkdir()
    (output / "base" / "weights").touch()
    record.claim(output, "checkpoint-1")
    (output / "checkpoint-1").mkdir()
    (output / "checkpoint-1" / "weights").touch()
    removed = record.present(output, record.read(output))
    for name in ("out", "link", "out/model", "link/model", "linked", "out/checkpoint-1/weights"):
        lost = record.removed_input({"--text": [str(tmp_path / name)]}, output, removed)
        assert lost == ("--text", str(tmp_path / name))
    for name in ("data", "out/mine", "out/base/weights", "missing"):
        assert record.removed_input({"--text": [str(tmp_path / name)]}, output, removed) is None
    assert record.removed_input({"--text": [str(output)]}, output, []) is None


def start_again(output, ready="b"):
    """A new run in the place of the one there, which is going to have ``ready``."""
    record.claim(output, ready)
    record.scratch(output, ready).write_text("new")
    record.replace(output, record.Record(files={ready: None}), [ready])


def test_replaced_is_all_that_the_old_record_names_and_nothing_else(tmp_path):
    output = made(tmp_path / "out", a="old", b="old")
    (output / "mine").write_text("mine")
    start_again(output)
    found = contents(output)
    assert found.pop(record.FILE)
    assert found == {"b": b"new", "mine": b"mine"}
    assert record.read(output).files == {"b": None}
    assert (record.read(output).replaced, record.read(output).ready) == ([], [])


CALLS = ["os.rename", "os.replace", "os.mkdir", "os.fsync", "os.unlink", "os.rmdir"]


def interrupted(output, count: int, error: BaseException, act) -> bool:
    """Let ``error`` happen at the ``count``-th change of the disk, from 1; whether there was one."""
    left = [count]

    def watched(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise error
            if left[0] < 0 and isinstance(error, Killed):
                raise error  # the dead do nothing
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(name, watched(getattr(os, name.removeprefix("os."))))
        try:
            act()
        except BaseException as caught:
            if caught is not error and caught.__cause__ is not error:
                raise
    return left[0] <= 0


@pytest.mark.parametrize("error", [Killed(), KeyboardInterrupt(), OSError(5, "Input/output error")], ids=repr)
def test_replaced_whole_or_not_at_all(tmp_path, error):
    """Broken off at every change of the disk; then what the next run does first."""
    count = 0
    outcomes = set()
    while True:
        count += 1
        output = made(tmp_path / f"out{count}", a="old", b="old")
        (output / "mine").write_text("mine")
        happened = interrupted(output, count, error, lambda output=output: start_again(output))
        record.recover(output)
        found = contents(output)
        assert found.pop(record.FILE)
        old = {"a": b"old", "b": b"old", "mine": b"mine"}
        assert found in (old, {"b": b"new", "mine": b"mine"})
        assert {*record.read(output).files} == found.keys() - {"mine"}
        outcomes.add(found == old)
        if not happened:
            break
    assert count > 10
    assert outcomes == {True, False}


def test_what_cannot_be_moved_is_one_line_and_all_is_as_it_was(tmp_path, monkeypatch):
    output = made(tmp_path / "out", a="old", b="old")
    rename = Path.rename

    def refuse(self, target):
        if self.name == "b" and self.parent == output:
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UsageError, match=r"cannot be replaced: .*/b: Permission denied; nothing was changed"):
        start_again(output, "c")
    found = contents(output)
    found.pop(record.FILE)
    assert found == {"a": b"old", "b": b"old"}


def test_a_new_record_that_does_not_reach_the_disk_is_taken_back(tmp_path, monkeypatch):
    output = made(tmp_path / "out", a="old", b="old")
    before = contents(output)
    flush, folders = record.flush, []

    def failing(path):
        folders.extend([path] if path == output else [])
        if len(folders) == 2:  # after that of what was moved aside
            folders.append(path)
            raise OSError(5, "Input/output error")
        flush(path)

    monkeypatch.setattr(record, "flush", failing)
    with pytest.raises((UsageError, OSError)):
        record.replace(output, record.Record(), [])
    assert contents(output) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove everything")
def test_why_not_removable(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").touch()
    assert record.why_not_removable(tmp_path / "a") is None
    (tmp_path / "a" / "b").chmod(0o555)
    assert record.why_not_removable(tmp_path / "a") == f"{tmp_path / 'a' / 'b'} is not writable"
    (tmp_path / "a" / "b").chmod(0o755)
