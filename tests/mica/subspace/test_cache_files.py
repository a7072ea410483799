"""Of the cache: damaged files, bad disks, several processes at once."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mica.subspace import cache as cache_module
from mica.subspace.cache import SubspaceCache
from mica.subspace.fingerprint import fingerprint
from tests.support.subspaces import only_file, same, solved

# Damage


@pytest.fixture
def stored():
    weight = torch.randn(3, 4)
    return weight, solved(weight, 2)


def check_damaged(cache, path, content, weight, subspace):
    path.write_bytes(content)
    loaded = cache.get(weight, 2)
    assert loaded is None or same(loaded, subspace)
    return loaded is None


def test_every_truncation_is_a_miss(cache, stored):
    cache.put(*stored)
    path = only_file(cache.folder)
    content = path.read_bytes()
    for length in range(len(content)):
        assert check_damaged(cache, path, content[:length], *stored), length
    assert check_damaged(cache, path, content + b"\0", *stored)
    assert not check_damaged(cache, path, content, *stored)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_no_flipped_bits_give_other_numbers(cache, stored, mask):
    cache.put(*stored)
    path = only_file(cache.folder)
    content = path.read_bytes()
    missed = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= mask
        missed += check_damaged(cache, path, bytes(flipped), *stored)
    assert missed >= len(content) - 8  # the padding of the header may turn into other white space


def test_a_warning_a_file_and_the_next_put_repairs(cache, weight, caplog):
    subspace = solved(weight, 4)
    for _ in range(2):
        cache.put(weight, subspace)
        path = only_file(cache.folder)
        path.write_bytes(b"nonsense")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mica"):
            assert cache.get(weight, 4) is None
            assert cache.get(weight, 4) is None
        (record,) = caplog.records
        assert record.name == "mica"
        assert str(path) in record.getMessage()
        assert "recomputed" in record.getMessage()
    cache.put(weight, subspace)
    assert same(cache.get(weight, 4), subspace)


def test_a_miss_is_not_worth_a_warning(cache, weight, caplog):
    assert cache.get(weight, 4) is None
    cache.put(weight, solved(weight, 4))
    assert cache.get(weight, 5) is None
    assert not caplog.records


def test_a_file_of_another_version_or_weight_is_a_miss(cache, weight, monkeypatch):
    key = fingerprint(weight)
    subspace = solved(weight, 4)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
        cache.put(weight, subspace, key=key)
    assert cache.get(weight, 4) is None
    cache.put(weight, subspace)
    assert same(cache.get(weight, 4), subspace)
    other = torch.randn(24, 30)
    only_file(cache.folder).rename(cache.path(fingerprint(other), 4))
    assert cache.get(other, 4) is None


@pytest.mark.parametrize("fitting", [torch.randn(25, 30), torch.randn(24, 30).double(), torch.randn(24, 3)])
def test_a_file_that_does_not_fit_the_weight_is_a_miss(cache, weight, fitting):
    key = fingerprint(weight)
    cache.put(weight, solved(weight, 4), key=key)
    assert cache.get(fitting, 2, key=key) is None


def test_a_well_formed_file_of_another_user_is_a_miss(cache, weight):
    subspace = solved(weight, 4)
    cache.put(weight, subspace)
    path = only_file(cache.folder)
    safetensors.torch.save_file({"basis": torch.eye(24, 4), "singular_values": torch.ones(4)}, path)
    assert cache.get(weight, 4) is None


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"\2" + b"\0" * 7 + b"[]", b"[" * 100_000])
def test_garbage_is_a_miss(cache, weight, content):
    cache.folder.mkdir(parents=True)
    cache.path(fingerprint(weight), 4).write_bytes(content)
    assert cache.get(weight, 4) is None
    cache.put(weight, solved(weight, 4))
    assert cache.get(weight, 4) is not None


# Disks


def test_a_folder_that_cannot_be_is_said_once(tmp_path, weight, caplog):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mica"):
            for cache in (SubspaceCache(folder), SubspaceCache(folder)):
                assert cache.get(weight, 4) is None
                cache.put(weight, solved(weight, 4))
                assert cache.get(weight, 4) is None
        (record,) = caplog.records
        assert str(folder) in record.getMessage()
        assert "not cached" in record.getMessage()
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_full_disk_leaves_nothing_behind(cache, weight, monkeypatch, failing):
    old, new = solved(weight, 4, method="gram"), solved(weight, 4)
    cache.put(weight, old)

    def fail(path, content):
        if failing == "write":
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_bytes") if failing == "write" else (os, "replace")), fail)
        cache.put(weight, new)
    only_file(cache.folder)
    assert same(cache.get(weight, 4), old)
    cache.put(weight, new)
    assert same(cache.get(weight, 4), new)


def test_a_file_that_cannot_be_read_or_replaced(cache, weight):
    cache.path(fingerprint(weight), 4).mkdir(parents=True)
    assert cache.get(weight, 4) is None
    cache.put(weight, solved(weight, 4))
    assert cache.get(weight, 4) is None
    assert only_file(cache.folder).is_dir()


def test_old_temporary_files_are_swept_and_no_others(cache, weight):
    cache.folder.mkdir(parents=True)
    kinds = {
        "old": f"{'0a' * 20}.{'1b' * 16}.tmp",
        "new": f"{'0a' * 20}.{'2c' * 16}.tmp",
        "foreign": "thesis.tmp",
        "stored": f"{'0a' * 20}.safetensors",
    }
    now = time.time()
    for kind, name in kinds.items():
        (cache.folder / name).write_bytes(b"")
        age = cache_module.ABANDONED_AFTER + (-60 if kind == "new" else 60)
        os.utime(cache.folder / name, (now - age, now - age))
    cache.put(weight, solved(weight, 4))
    left = {path.name for path in cache.folder.iterdir()}
    assert left == {*kinds.values(), cache.path(fingerprint(weight), 4).name} - {kinds["old"]}


def test_a_fifo_does_not_hang(cache, weight):
    cache.folder.mkdir(parents=True)
    path = cache.path(fingerprint(weight), 4)
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(cache.get, weight, 4)
        try:
            assert reading.result(timeout=20) is None
        finally:
            if not reading.done():
                path.write_bytes(b"")  # lets the reader go
    cache.put(weight, solved(weight, 4))
    assert same(cache.get(weight, 4), solved(weight, 4))


def test_what_is_no_file_or_far_too_large_is_a_miss(cache, weight, tmp_path):
    cache.folder.mkdir(parents=True)
    path = cache.path(fingerprint(weight), 4)
    path.symlink_to("/dev/zero")
    assert cache.get(weight, 4) is None
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse; larger than any memory
    assert cache.get(weight, 4) is None


# Several at once

KILLED = """
import os, sys, time, torch
from pathlib import Path
from mica.subspace.cache import SubspaceCache
from mica.subspace.result import MinorSubspace

def stop(path, content):
    if step == "write":
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
    print("inside", flush=True)
    time.sleep(60)

folder, step, saved = sys.argv[1:]
setattr(*((Path, "write_bytes") if step == "write" else (os, "replace")), stop)
weight, fields = torch.load(saved)
SubspaceCache(folder).put(weight, MinorSubspace(**fields))
"""


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_killed_writer_is_harmless(cache, weight, tmp_path, step):
    subspace = solved(weight, 4)
    torch.save((weight, dict(vars(subspace))), tmp_path / "saved")
    arguments = [sys.executable, "-c", KILLED, str(cache.folder), step, str(tmp_path / "saved")]
    root = str(Path(cache_module.__file__).parents[2])
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, cwd=root, env={**os.environ, "PYTHONPATH": root}
    ) as process:
        assert process.stdout.readline() == b"inside\n"
        process.send_signal(signal.SIGKILL)
    left = only_file(cache.folder)
    assert left.suffix == ".tmp"
    assert cache.get(weight, 4) is None
    cache.put(weight, subspace)
    assert same(cache.get(weight, 4), subspace)
    assert left.exists()
    os.utime(left, (0, 0))
    SubspaceCache(cache.folder).put(weight, solved(weight, 6))
    assert not left.exists()


def _put_again_and_again(folder, weight, key, subspaces, until):
    cache = SubspaceCache(folder)
    while time.time() < until:
        for subspace in subspaces:
            cache.put(weight, subspace, key=key)
        for subspace in subspaces:
            cache.path(key, subspace.basis.shape[1]).unlink(missing_ok=True)


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there")
@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_writers_and_readers_at_once(cache, kind, caplog):
    weight = torch.randn(200, 220)
    subspaces = [solved(weight, rank) for rank in (20, 40)]
    key = fingerprint(weight)
    worker = multiprocessing.get_context("fork").Process if kind == "processes" else threading.Thread
    until = time.time() + 1.5
    writers = [
        worker(target=_put_again_and_again, args=(cache.folder, weight, key, subspaces[::step], until))
        for step in (1, -1)
    ]
    for writer in writers:
        writer.start()
    outcomes = set()
    while any(writer.is_alive() for writer in writers):
        for subspace in subspaces:
            rank = subspace.basis.shape[1]
            loaded = cache.get(weight, rank, key=key)
            outcomes.add((rank, loaded is not None))
            if loaded is not None:
                assert same(loaded, subspace)
    for writer in writers:
        writer.join()
        assert kind == "threads" or writer.exitcode == 0
    assert {(20, True), (40, True)} <= outcomes
    assert not [path for path in cache.folder.iterdir() if path.suffix == ".tmp"]
    assert not caplog.records  # nothing was ever seen half written
