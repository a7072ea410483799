"""Which checkpoints count, with files that some program has left half written."""

import errno
import json
import os
from contextlib import suppress

import pytest

from mica.cli.adapt import checkpoints
from mica.errors import UsageError


def make(output, step, marked=True, **facts):
    folder = output / f"checkpoint-{step}"
    (folder / "optimizer_0").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "optimizer_0" / "shard.distcp").write_bytes(b"moments")
    if marked:
        checkpoints.mark(folder, step=step, **facts)
    return folder


def test_the_newest_complete_one_counts(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "missing") is None
    make(tmp_path, 90)
    newest = make(tmp_path, 100)  # 100 > 90, though not as text
    half = make(tmp_path, 110, marked=False)
    for other in ("checkpoint-x", "checkpoint-120.tmp", "checkpoint"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-130").write_text("a file")
    assert checkpoints.latest(tmp_path) == newest == checkpoints.to_resume(tmp_path)
    checkpoints.discard(tmp_path)
    assert not half.exists()
    assert [checkpoints.step(path) for path in checkpoints.folders(tmp_path)] == [90, 100]
    assert (tmp_path / "checkpoint-x").is_dir()
    checkpoints.discard(tmp_path, resumed=tmp_path / "checkpoint-90")  # so the one after it is damaged
    assert [checkpoints.step(path) for path in checkpoints.folders(tmp_path)] == [90]


@pytest.mark.parametrize("damage", ["cut", "gone", "shard gone", "marker cut", "marker is a list"])
def test_a_damaged_one_does_not_count(tmp_path, damage):
    good, bad = make(tmp_path, 1), make(tmp_path, 2)
    if damage == "cut":
        (bad / "adapter_model.safetensors").write_bytes(b"weigh")
    elif damage == "gone":
        (bad / "adapter_model.safetensors").unlink()
    elif damage == "shard gone":
        (bad / "optimizer_0" / "shard.distcp").unlink()
    elif damage == "marker cut":
        marker = bad / checkpoints.MARKER
        marker.write_text(marker.read_text()[:-9])
    else:
        (bad / checkpoints.MARKER).write_text("[]")
    assert checkpoints.facts(bad) is None
    assert checkpoints.latest(tmp_path) == good


def flip(path):
    """Damage that keeps the size."""
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 0x41
    path.write_bytes(contents)


def test_damage_that_keeps_the_size_is_found_before_one_is_resumed(tmp_path, monkeypatch):
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    flip(newer / "optimizer_0" / "shard.distcp")
    assert checkpoints.damaged(older) is None
    assert checkpoints.damaged(newer) == "optimizer_0/shard.distcp"
    assert checkpoints.to_resume(tmp_path) == older
    flip(older / "adapter_model.safetensors")
    with pytest.raises(
        UsageError,
        match=r"checkpoint-2 is damaged \(optimizer_0/.*\) and checkpoint-1 is damaged \(adapter_model",
    ):
        checkpoints.to_resume(tmp_path)
    monkeypatch.setattr(checkpoints, "_hash", lambda path: pytest.fail("read by a look for checkpoints"))
    assert checkpoints.latest(tmp_path) == newer
    checkpoints.rotate(tmp_path, 2)


def test_markers_of_earlier_versions_count(tmp_path):
    folder = make(tmp_path, 3)
    marker = json.loads((folder / "complete.json").read_text())
    del marker["hashes"]
    (folder / "complete.json").write_text(json.dumps(marker))
    assert checkpoints.to_resume(tmp_path) == folder
    checkpoints.check(folder, step=3, base_weights="1f", learning_rate=0.5)


def test_the_marker_names_files_and_facts(tmp_path):
    folder = make(tmp_path, 7, seconds=1.5)
    marker = json.loads((folder / "complete.json").read_text())
    assert marker["files"] == {"adapter_model.safetensors": 7, "optimizer_0/shard.distcp": 7}
    assert marker["hashes"].keys() == marker["files"].keys()
    assert checkpoints.facts(folder) == {"step": 7, "seconds": 1.5}


@pytest.mark.parametrize("stage", ["fsync", "write", "replace"])
def test_no_marker_where_the_disk_is_full(tmp_path, monkeypatch, stage):
    folder = make(tmp_path, 1, marked=False)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    name = {"fsync": "os.fsync", "write": "pathlib.Path.write_text", "replace": "os.replace"}[stage]
    monkeypatch.setattr(name, fail)
    with pytest.raises(OSError, match="No space"):
        checkpoints.mark(folder, step=1)
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "optimizer_0"}


def test_every_file_is_on_the_disk_before_the_marker(tmp_path, monkeypatch):
    folder = make(tmp_path, 1, marked=False)
    flushed = []
    monkeypatch.setattr(
        checkpoints, "_flush", lambda path: flushed.append((path.name, (folder / "complete.json").exists()))
    )
    checkpoints.mark(folder)
    before = {name for name, marked in flushed if not marked}
    assert before == {"adapter_model.safetensors", "shard.distcp", ".complete.json"}
    assert {name for name, marked in flushed if marked} == {"checkpoint-1", tmp_path.name}  # their entries


def test_the_last_complete_ones_are_kept(tmp_path):
    for step in (5, 10, 15):
        make(tmp_path, step)
    make(tmp_path, 20, marked=False)  # not one of those that are kept, nor anyone's to remove here
    checkpoints.rotate(tmp_path, 2)
    assert [checkpoints.step(path) for path in checkpoints.folders(tmp_path)] == [10, 15, 20]


def test_a_second_ctrl_c_while_old_ones_are_removed_is_no_failure_to_write(tmp_path, monkeypatch):
    """Between two lines of Python 3.11's rmtree, which then raises that a file descriptor is bad."""
    make(tmp_path, 5), make(tmp_path, 10)
    close = os.close

    def interrupted(descriptor):
        monkeypatch.setattr(os, "close", close)
        close(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with suppress(KeyboardInterrupt):  # other versions
        checkpoints.rotate(tmp_path, 1)
    assert os.close is close
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-10"


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"--resume: nothing to go on from in .*it has no checkpoint; leave out --resume"
    ):
        checkpoints.to_resume(tmp_path)
    make(tmp_path, 3, marked=False)
    with pytest.raises(UsageError, match="checkpoint-3 is incomplete"):
        checkpoints.to_resume(tmp_path)


def test_other_settings_are_refused(tmp_path):
    folder = make(tmp_path, 3, processes=2, batch_size=4)
    checkpoints.check(folder, processes=2, batch_size=4, data="not in the marker")
    with pytest.raises(
        UsageError,
        match=r"checkpoint-3 was written with processes 2 \(now 1\), batch_size 4 \(now 8\): .* by --adapter",
    ):
        checkpoints.check(folder, processes=1, batch_size=8)
    folder = make(tmp_path, 4, base_weights="1f")
    with pytest.raises(UsageError, match=r"with base_weights 1f \(now 2e\): .* Put the base .* start anew$"):
        checkpoints.check(folder, base_weights="2e")
