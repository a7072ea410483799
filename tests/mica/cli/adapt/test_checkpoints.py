"""Which checkpoints count, with files that some program has left half written."""

import errno
import json
import shutil

import pytest

from mica.cli import output as output_module
from mica.cli import record
from mica.cli.adapt import checkpoints, fingerprint
from mica.errors import UsageError

ADAPTER, SHARD = "adapter_model.safetensors", "optimizer_0/shard.distcp"


def make(output, step, marked=True, **facts):
    folder = output / f"checkpoint-{step}"
    record.claim(output, folder.name)
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
    assert checkpoints.latest(tmp_path) == newest == checkpoints.to_resume(tmp_path)
    checkpoints.discard(tmp_path)
    assert steps(tmp_path) == [90, 100]
    assert (tmp_path / "checkpoint-x").is_dir()
    with pytest.raises(UsageError, match="checkpoint-100 was written after checkpoint-90 had been chosen"):
        checkpoints.discard(tmp_path, resumed=tmp_path / "checkpoint-90")
    flip(newest / ADAPTER)
    checkpoints.discard(tmp_path, resumed=tmp_path / "checkpoint-90")
    assert steps(tmp_path) == [90]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        pytest.param(ADAPTER, b"weigh", id="cut"),
        pytest.param(ADAPTER, None, id="gone"),
        pytest.param(SHARD, None, id="shard gone"),
        pytest.param(checkpoints.MARKER, b'{"step": 2, "files": {', id="marker cut"),
        pytest.param(checkpoints.MARKER, b"[]", id="marker is a list"),
        pytest.param(
            checkpoints.MARKER, b'{"step": 2, "files": {}, "hashes": {}}', id="marker names no file"
        ),
    ],
)
def test_a_damaged_one_does_not_count(tmp_path, file, content):
    good, bad = make(tmp_path, 1), make(tmp_path, 2)
    (bad / file).unlink()
    if content is not None:
        (bad / file).write_bytes(content)
    assert checkpoints.facts(bad) is None
    assert checkpoints.latest(tmp_path) == good


def flip(path):
    """Damage that keeps the size."""
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 0x41
    path.write_bytes(contents)


def test_damage_that_keeps_the_size_is_found_before_one_is_resumed(tmp_path, monkeypatch):
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    flip(newer / SHARD)
    assert checkpoints.damaged(older) is None
    assert checkpoints.damaged(newer) == SHARD
    assert checkpoints.to_resume(tmp_path) == older
    flip(older / ADAPTER)
    message = rf"checkpoint-2 is damaged \({SHARD}\) and checkpoint-1 is damaged \({ADAPTER}\)"
    with pytest.raises(UsageError, match=message):
        checkpoints.to_resume(tmp_path)
    monkeypatch.setattr(fingerprint, "of_file", lambda path: pytest.fail("read by a look for checkpoints"))
    assert checkpoints.latest(tmp_path) == newer
    checkpoints.rotate(tmp_path, 2)


@pytest.mark.parametrize("name", [SHARD, checkpoints.MARKER])
def test_a_checkpoint_that_was_complete_is_named(tmp_path, name):
    folder = make(tmp_path, 1)
    (folder / name).write_bytes(b"")
    with pytest.raises(UsageError, match=rf"checkpoint-1 is damaged \({name}\)"):
        checkpoints.to_resume(tmp_path)
    (folder / SHARD).unlink()
    assert checkpoints.marked(tmp_path) == [folder]


def test_the_marker_names_files_and_facts(tmp_path):
    folder = make(tmp_path, 7, seconds=1.5)
    marker = json.loads((folder / "complete.json").read_text())
    assert marker["files"] == {ADAPTER: 7, SHARD: 7}
    assert marker["hashes"].keys() == marker["files"].keys()
    assert checkpoints.facts(folder) == {"step": 7, "seconds": 1.5}


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.write_text", "os.replace"])
def test_no_marker_where_the_disk_is_full(tmp_path, monkeypatch, call):
    folder = make(tmp_path, 1, marked=False)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="No space"):
        checkpoints.mark(folder, step=1)
    assert {path.name for path in folder.iterdir()} == {ADAPTER, "optimizer_0"}


def test_every_file_is_on_the_disk_before_the_marker(tmp_path, monkeypatch):
    folder = make(tmp_path, 1, marked=False)
    flushed = {False: set(), True: set()}
    marked = (folder / checkpoints.MARKER).exists
    for module in (checkpoints, output_module):
        monkeypatch.setattr(module, "flush", lambda path: flushed[marked()].add(path.name))
    checkpoints.mark(folder)
    assert flushed[False] == {ADAPTER, "shard.distcp", ".complete.json"}
    assert flushed[True] == {"checkpoint-1", tmp_path.name}  # their entries


def test_one_that_has_lost_its_marker_is_named_and_kept(tmp_path):
    folder = make(tmp_path, 1)
    (folder / checkpoints.MARKER).unlink()
    assert checkpoints.marked(tmp_path) == [folder]
    with pytest.raises(UsageError, match=r"checkpoint-1 is damaged \(complete.json\)"):
        checkpoints.to_resume(tmp_path)
    assert steps(tmp_path) == [1]


def test_those_of_nobody_and_what_somebody_has_put_into_one_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    record.forget(tmp_path, "checkpoint-1")
    (tmp_path / "checkpoint-2" / "notes.txt").touch()
    checkpoints.rotate(tmp_path, 1)
    assert steps(tmp_path) == [1, 2, 4]
    assert checkpoints.marked(tmp_path) == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"]
    checkpoints.discard(tmp_path)
    assert steps(tmp_path) == [1, 2, 4]


def test_the_last_complete_ones_are_kept(tmp_path):
    for step in (5, 10, 15):
        make(tmp_path, step)
    make(tmp_path, 20, marked=False)  # not one of those that are kept, nor anyone's to remove here
    checkpoints.rotate(tmp_path, 2)
    assert steps(tmp_path) == [10, 15, 20]
    make(tmp_path, 25)
    checkpoints.rotate(tmp_path, 2, best=10)
    assert steps(tmp_path) == [10, 15, 20, 25]
    checkpoints.rotate(tmp_path, 2, best=25)
    assert steps(tmp_path) == [15, 20, 25]


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    message = r"--resume: nothing to continue from in .*it has no checkpoint; leave out --resume"
    with pytest.raises(UsageError, match=message):
        checkpoints.to_resume(tmp_path)
    make(tmp_path, 3, marked=False)
    with pytest.raises(UsageError, match="checkpoint-3 is incomplete"):
        checkpoints.to_resume(tmp_path)


def test_a_checkpoint_of_another_folder_is_resumed_with_its_record_only(tmp_path):
    made = make(tmp_path / "run", 3)
    copy = shutil.copytree(made, tmp_path / "copy" / made.name)
    with pytest.raises(UsageError, match=r"checkpoint-3 belongs to another run than mica-run\.json \(copy"):
        checkpoints.to_resume(copy.parent)
    shutil.copy(made.parent / record.FILE, copy.parent)
    assert checkpoints.to_resume(copy.parent) == copy


def test_other_settings_are_refused(tmp_path):
    folder = make(tmp_path, 3, processes=2, batch_size=4)
    checkpoints.check(folder, processes=2, batch_size=4, data="not in the marker")
    message = r"checkpoint-3 was written with processes 2 \(now 1\), batch_size 4 \(now 8\): .*: --adapter"
    with pytest.raises(UsageError, match=message):
        checkpoints.check(folder, processes=1, batch_size=8)
    folder = make(tmp_path, 4, base_weights="1f")
    with pytest.raises(
        UsageError, match=r"with base_weights 1f \(now 2e\): .* Put the base .* start afresh$"
    ):
        checkpoints.check(folder, base_weights="2e")
