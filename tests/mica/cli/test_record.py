"""What a command may replace and remove: files that hold what commands have written there."""

import json

import pytest

from mica.cli.record import NAME, NotOwnError, Record


@pytest.fixture
def record(output):
    output.mkdir()
    return Record(output)


def put(record, name, text, moved=True):
    """Write a file as a command does; ``moved``: False where it is killed before the rename."""
    scratch, path = record.folder.parent / "scratch", record.folder / name
    scratch.write_text(text)
    record.claim({path: scratch})
    if moved:
        path.parent.mkdir(exist_ok=True)
        scratch.replace(path)
    return path


def test_after_any_kills_what_a_command_wrote_is_its_own(record):
    path = put(record, "file", "one")
    for text in ("two", "three", "four"):
        put(record, "file", text, moved=False)
    assert path.read_text() == "one"
    put(record, "file", "five")
    record.remove(["file", "never there"])
    assert not list(record.folder.iterdir())


@pytest.mark.parametrize(
    "content", [None, "", "[", "[]", "null", '{"file": null}', '{"file": []}', "[" * 100_000]
)
def test_what_is_not_recorded_is_the_users(record, content):
    (record.folder / "file").write_text("mine")
    (record.folder / "folder" / "file").mkdir(parents=True)
    if content is not None:
        (record.folder / NAME).write_text(content)
    for name in ("file", "folder"):
        with pytest.raises(NotOwnError, match=f"/out/{name} is not what mica has written there: move it"):
            put(record, name, "new")
    record.remove(["file", "folder", "folder/file"])
    assert (record.folder / "file").read_text() == "mine"
    assert (record.folder / "folder" / "file").is_dir()


def test_no_name_leads_out_of_the_folder(record):
    """A folder with its record may come from others."""
    outside = record.folder.parent / "file"
    outside.write_text("text")
    put(record, "inside", "text")
    found = json.loads((record.folder / NAME).read_text())
    names = ["../file", "inside/../../file", str(outside)]
    (record.folder / NAME).write_text(json.dumps(found | dict.fromkeys(names, found["inside"])))
    record.remove(record.names())
    record.remove(names)
    assert outside.exists()
    assert not (record.folder / "inside").exists()
