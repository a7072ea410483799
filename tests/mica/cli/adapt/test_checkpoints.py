"""Which checkpoints count, with files that some program has left half written."""

import shutil
from pathlib import Path

import pytest

from mica.cli import output as output_module
from mica.cli.adapt import checkpoints
from mica.cli.adapt.folder import MARKER
from mica.cli.output import files_in
from mica.cli.record import NAME
from mica.errors import UsageError
from tests.support.adapt_runs import steps
from tests.support.faults import raising

ADAPTER, SHARD = "adapter_model.safetensors", "optimizer_0/shard.distcp"


def put(folder):
    """What the Trainer writes."""
    (folder / "optimizer_0").mkdir(parents=True)
    (folder / ADAPTER).write_bytes(b"weights")
    (folder / SHARD).write_bytes(b"moments")


def make(output, step, **facts):
    put(checkpoints.folder_of(checkpoints.scratch(output), step))
    checkpoints.finish(output, step, facts)
    return checkpoints.folder_of(output, step)


def test_the_newest_complete_one_counts(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "missing") is None
    make(tmp_path, 90)
    newest = make(tmp_path, 100)  # 100 > 90, though not as text
    put(tmp_path / "checkpoint-110")
    for other in ("checkpoint-x", "checkpoint-120.tmp", "checkpoint"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-130").write_text("a file")
    assert checkpoints.latest(tmp_path) == newest
    assert steps(tmp_path) == [90, 100, 110]


@pytest.mark.parametrize("content", [None, b'{"step": 2', b"[]", b"[" * 100_000])
def test_one_without_a_marker_that_can_be_read_does_not_count(tmp_path, content):
    good, bad = make(tmp_path, 1), make(tmp_path, 2)
    (bad / MARKER).unlink()
    if content is not None:
        (bad / MARKER).write_bytes(content)
    assert checkpoints.facts(bad) is None
    assert checkpoints.latest(tmp_path) == good


def test_a_marker_that_cannot_be_read_is_an_error_and_not_missing(tmp_path, monkeypatch):
    """As on a network disk: the run would begin anew beside its checkpoints."""
    make(tmp_path, 3)
    monkeypatch.setattr(Path, "read_bytes", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(UsageError, match=r"complete.json cannot be read: Permission denied$"):
        checkpoints.latest(tmp_path)


def test_every_file_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    flushed = {False: set(), True: set()}
    for module in (checkpoints, output_module):
        monkeypatch.setattr(module, "flush", lambda path: flushed[bool(steps(tmp_path))].add(path.name))
    make(tmp_path, 1)
    assert flushed == {False: {ADAPTER, "shard.distcp", MARKER}, True: {"checkpoint-1", tmp_path.name}}


def test_the_last_complete_ones_are_kept(tmp_path):
    for step in (5, 10, 15):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path, 2)
    assert steps(tmp_path) == [10, 15]
    make(tmp_path, 25)
    checkpoints.rotate(tmp_path, 2, best=10)
    assert steps(tmp_path) == [10, 15, 25]
    checkpoints.rotate(tmp_path, 2, best=25)
    assert steps(tmp_path) == [15, 25]


def test_what_a_user_has_put_there_stays(tmp_path):
    """Checkpoints of others, also whole ones, and files in those of the run."""
    put(tmp_path / "checkpoint-3")
    other = make(tmp_path / "other", 4)
    shutil.copytree(other, tmp_path / "checkpoint-4")
    for step in (5, 10):
        make(tmp_path, step)
    notes, edited = tmp_path / "checkpoint-5" / "notes.txt", tmp_path / "checkpoint-5" / ADAPTER
    notes.write_text("mine")
    edited.write_bytes(b"mine")
    before = [path for path in files_in(tmp_path) if "checkpoint-5" not in path.parts]
    checkpoints.rotate(tmp_path, 1)
    assert {*before, notes, edited, tmp_path / NAME} == {*files_in(tmp_path)}
    for name in ("checkpoint-12/notes.txt", "checkpoint-13"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match=r"/checkpoint-1[23] is there already: move it away$"):
            make(tmp_path, int(name[11:13]))
        assert (tmp_path / name).read_text() == "mine"


def test_one_that_is_removed_does_not_count_from_the_start(tmp_path, monkeypatch):
    """A kill may leave some of its files, which go with the next."""
    for step in (1, 2):
        make(tmp_path, step)
    unlink = Path.unlink

    def kill(path, missing_ok=False):
        unlink(path, missing_ok)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", kill)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.rotate(tmp_path, 1)
    monkeypatch.undo()
    assert steps(tmp_path) == [1, 2]
    assert checkpoints.complete(tmp_path) == [tmp_path / "checkpoint-2"]
    checkpoints.rotate(tmp_path, 1)
    assert steps(tmp_path) == [2]


def test_what_its_marker_does_not_have_is_not_compared(tmp_path):
    folder = make(tmp_path, 3, processes=2)
    assert checkpoints.facts(folder) == {"processes": 2, "files": [ADAPTER, SHARD]}
    checkpoints.check(folder, processes=2, data="not in the marker")
