"""Which checkpoints count, with files that some program has left half written."""

import errno
from pathlib import Path

import pytest

from mica.cli import output as output_module
from mica.cli.adapt import checkpoints
from mica.cli.adapt.folder import MARKER
from mica.errors import UsageError

ADAPTER, SHARD = "adapter_model.safetensors", "optimizer_0/shard.distcp"


def make(output, step, marked=True, **facts):
    folder = output / f"checkpoint-{step}"
    (folder / "optimizer_0").mkdir(parents=True)
    (folder / ADAPTER).write_bytes(b"weights")
    (folder / SHARD).write_bytes(b"moments")
    if marked:
        checkpoints.mark(folder, step=step, **facts)
    return folder


def steps(output):
    return [checkpoints.step(path) for path in checkpoints.folders(output)]


def test_the_newest_complete_one_counts(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "missing") is None
    make(tmp_path, 90)
    newest = make(tmp_path, 100)  # 100 > 90, though not as text
    make(tmp_path, 110, marked=False)
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

    def denied(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(UsageError, match=r"complete.json cannot be read: Permission denied$"):
        checkpoints.latest(tmp_path)


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.write_text", "os.replace"])
def test_no_marker_where_the_disk_is_full(tmp_path, monkeypatch, call):
    folder = make(tmp_path, 1, marked=False)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises((OSError, UsageError), match="No space"):
        checkpoints.mark(folder, step=1)
    assert {path.name for path in folder.iterdir()} == {ADAPTER, "optimizer_0"}


def test_every_file_is_on_the_disk_before_the_marker(tmp_path, monkeypatch):
    folder = make(tmp_path, 1, marked=False)
    flushed = {False: set(), True: set()}
    marked = (folder / MARKER).exists
    for module in (checkpoints, output_module):
        monkeypatch.setattr(module, "flush", lambda path: flushed[marked()].add(path.name))
    checkpoints.mark(folder)
    assert {ADAPTER, "shard.distcp"} < flushed[False]
    assert [name.endswith(".partial") for name in flushed[False] - {ADAPTER, "shard.distcp"}] == [True]
    assert flushed[True] == {"checkpoint-1", tmp_path.name}  # their entries


def test_the_last_complete_ones_are_kept(tmp_path):
    for step in (5, 10, 15):
        make(tmp_path, step)
    make(tmp_path, 7, marked=False)
    make(tmp_path, 20, marked=False)  # not one of those that are kept; it may be being written
    (tmp_path / "checkpoint-notes").mkdir()
    checkpoints.rotate(tmp_path, 2)
    assert steps(tmp_path) == [10, 15, 20]
    make(tmp_path, 25)
    checkpoints.rotate(tmp_path, 2, best=10)
    assert steps(tmp_path) == [10, 15, 20, 25]
    checkpoints.rotate(tmp_path, 2, best=25)
    assert steps(tmp_path) == [15, 20, 25]
    assert (tmp_path / "checkpoint-notes").is_dir()


def test_one_that_is_removed_does_not_count_from_the_start(tmp_path, monkeypatch):
    """A kill may leave some of its files."""
    for step in (1, 2):
        make(tmp_path, step)
    monkeypatch.setattr("shutil.rmtree", lambda path: None)
    checkpoints.rotate(tmp_path, 1)
    assert checkpoints.complete(tmp_path) == [tmp_path / "checkpoint-2"]
    (tmp_path / "checkpoint-2" / MARKER).unlink()
    checkpoints.rotate(tmp_path, 1)
    assert steps(tmp_path) == [1, 2]


def test_other_settings_are_refused(tmp_path):
    folder = make(tmp_path, 3, processes=2, batch_size=4)
    assert checkpoints.facts(folder) == {"step": 3, "processes": 2, "batch_size": 4}
    checkpoints.check(folder, processes=2, batch_size=4, data="not in the marker")
    message = r"checkpoint-3 was written with processes 2 \(now 1\): .*: --adapter"
    with pytest.raises(UsageError, match=message):
        checkpoints.check(folder, processes=1)
    folder = make(tmp_path, 4, base_weights="1f")
    with pytest.raises(
        UsageError, match=r"with base_weights 1f \(now 2e\): .* Put the base .* start afresh$"
    ):
        checkpoints.check(folder, base_weights="2e")
