"""The cache with damaged files, bad disks and several processes; whom it trusts, and how much it keeps."""

import logging
import multiprocessing
import os
import signal
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
from mica.subspace.content_hash import content_hash
from tests.mica.subspace.subspaces import only_file, put, same, solved


@pytest.fixture
def weight():
    return torch.randn(24, 30)


# Damage


def flipped(content, mask):
    for place, byte in enumerate(content):
        yield content[:place] + bytes([byte ^ mask]) + content[place + 1 :]


OF_ANOTHER_USER = {"basis": torch.eye(3, 2), "singular_values": torch.ones(2)}
DAMAGED = {
    "truncated": lambda content: [*(content[:length] for length in range(len(content))), content + b"\0"],
    **{f"flipped by {m:x}": lambda content, m=m: flipped(content, m) for m in (0x01, 0x20, 0x80, 0xFF)},
    "garbage": lambda _: [b"\0" * 8, b"\xff" * 64, b"\2" + b"\0" * 7 + b"[]", b"[" * 100_000],
    "well-formed": lambda _: [safetensors.torch.save(OF_ANOTHER_USER)],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_any_damage_is_a_miss_and_the_next_put_repairs(cache, damage):
    weight = torch.randn(3, 4)
    subspace = put(cache, weight, 2)
    path = only_file(cache.folder)
    for place, damaged in enumerate(DAMAGED[damage](path.read_bytes())):
        path.write_bytes(damaged)
        assert cache.get(weight, 2) is None, place
    cache.put(weight, subspace)
    assert same(cache.get(weight, 2), subspace)


def test_a_warning_a_file_and_none_of_a_miss(cache, weight, caplog):
    caplog.set_level(logging.WARNING, "mica")
    assert cache.get(weight, 4) is None
    subspace = put(cache, weight)
    assert cache.get(weight, 5) is None
    assert not caplog.records
    path = only_file(cache.folder)
    path.write_bytes(b"nonsense")
    assert cache.get(weight, 4) is None
    assert cache.get(weight, 4) is None
    (record,) = caplog.records
    assert record.name == "mica"
    assert str(path) in record.getMessage()
    assert "recomputed" in record.getMessage()
    cache.put(weight, subspace)
    assert same(cache.get(weight, 4), subspace)


def test_a_file_of_another_version_or_weight_or_that_does_not_fit_is_a_miss(cache, weight, monkeypatch):
    weight = weight.bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
        put(cache, weight)
    assert cache.get(weight, 4) is None
    assert same(put(cache, weight), cache.get(weight, 4))
    key = content_hash(weight)
    for fitting in (torch.randn(25, 30), torch.randn(24, 30).double(), torch.randn(24, 3)):
        assert cache.get(fitting, 2, key=key) is None
        assert cache.get(fitting, 4, key=key) is None


# Disks


def test_a_folder_that_cannot_be_is_said_once(tmp_path, weight, caplog):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        caplog.clear()
        for cache in (SubspaceCache(folder), SubspaceCache(folder)):
            assert cache.get(weight, 4) is None
            put(cache, weight)
            assert cache.get(weight, 4) is None
        (message,) = caplog.messages
        assert str(folder) in message
        assert "not cached" in message
    assert (tmp_path / "file").read_text() == ""


def half(path, content):
    """Write half of the content."""
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])


WRITING = {"write": (Path, "write_bytes"), "replace": (os, "replace")}


@pytest.mark.parametrize("failing", WRITING)
def test_a_full_disk_leaves_nothing_behind(cache, weight, monkeypatch, failing):
    old = put(cache, weight, method="gram")

    def fail(path, content):
        if failing == "write":
            half(path, content)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*WRITING[failing], fail)
        put(cache, weight)
    only_file(cache.folder)
    assert same(cache.get(weight, 4), old)
    assert same(put(cache, weight), cache.get(weight, 4))


UNREADABLE = {
    "directory": Path.mkdir,
    "fifo": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_file_is_a_miss(cache, weight, kind):
    cache.folder.mkdir(parents=True)
    path = cache.path(content_hash(weight), 4)
    UNREADABLE[kind](path)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(cache.get, weight, 4)
        try:
            assert reading.result(timeout=20) is None
        finally:
            if not reading.done():
                path.write_bytes(b"")  # lets the reader of a FIFO go
    subspace = put(cache, weight)
    assert only_file(cache.folder).is_dir() == (kind == "directory")  # which cannot be replaced
    loaded = cache.get(weight, 4)
    assert loaded is None if kind == "directory" else same(loaded, subspace)


# Several at once


def _killed(cache, weight, subspace, step):
    def stop(path, content):
        if step == "write":
            half(path, content)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(*WRITING[step], stop)
    cache.put(weight, subspace)


@pytest.mark.parametrize("step", WRITING)
def test_what_a_killed_writer_leaves_is_harmless_and_evicted_and_no_other_file(cache, weight, step):
    subspace, fork = solved(weight, 4), multiprocessing.get_context("fork")
    process = fork.Process(target=_killed, args=(cache, weight, subspace, step))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = only_file(cache.folder)
    assert left.suffix == ".tmp"
    assert cache.get(weight, 4) is None
    cache.put(weight, subspace)
    assert same(cache.get(weight, 4), subspace)
    assert left.exists()

    stored = cache.path(content_hash(weight), 4)
    earlier = cache.folder / f"{'0a' * 32}.4.subspace"  # as versions before named them
    others = {cache.folder / "thesis.tmp", cache.folder / f"{'0a' * 32}.tmp"}
    for path in (left, earlier, *others):
        path.write_bytes(bytes(10))
        os.utime(path, (1, 1))
    put(SubspaceCache(cache.folder, 2 * stored.stat().st_size), weight, 4)
    assert {*cache.folder.iterdir()} == {stored, left, earlier, *others}
    put(SubspaceCache(cache.folder, stored.stat().st_size), weight, 4)
    assert {*cache.folder.iterdir()} == {stored, *others}


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
    subspaces, key = {rank: solved(weight, rank) for rank in (20, 40)}, content_hash(weight)
    worker = multiprocessing.get_context("fork").Process if kind == "processes" else threading.Thread
    until, order = time.time() + 1.5, list(subspaces.values())
    arguments = [(cache.folder, weight, key, each, until) for each in (order, order[::-1])]
    writers = [worker(target=_put_again_and_again, args=each) for each in arguments]
    for writer in writers:
        writer.start()
    outcomes = set()
    while any(writer.is_alive() for writer in writers):
        for rank, subspace in subspaces.items():
            loaded = cache.get(weight, rank, key=key)
            outcomes.add((rank, loaded is not None))
            assert loaded is None or same(loaded, subspace)
    for writer in writers:
        writer.join()
        assert kind == "threads" or writer.exitcode == 0
    assert {(20, True), (40, True)} <= outcomes
    assert not [path for path in cache.folder.iterdir() if path.suffix == ".tmp"]
    assert not caplog.records  # nothing was ever seen half written


# Whom it trusts

on_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


@on_posix
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_not_used_and_said_once(cache, weight, caplog, mode):
    subspace = put(cache, weight)
    cache.folder.chmod(mode)
    for reader in (cache, SubspaceCache(cache.folder)):
        assert reader.get(weight, 4) is None
        put(reader, weight, 5)
    (message,) = caplog.messages
    for part in (str(cache.folder), f"written by others (mode {mode:o})", "MICA_CACHE"):
        assert part in message
    only_file(cache.folder)
    cache.folder.chmod(0o755)
    assert same(cache.get(weight, 4), subspace)


@on_posix
def test_nor_is_one_of_another_user(cache, weight, caplog, monkeypatch):
    put(cache, weight)
    owner = other = os.stat(cache.folder).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if not owner:  # root's is everybody's friend
        assert cache.get(weight, 4) is not None
        other = 12345
        os.chown(cache.folder, other, -1)
        monkeypatch.undo()
    assert cache.get(weight, 4) is None
    (message,) = caplog.messages
    assert f"belongs to another user ({other})" in message
    os.chown(cache.folder, owner, -1)


@on_posix
@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_what_it_makes_it_trusts_until_others_can_write_it(cache, weight, umask):
    before = os.umask(umask)
    try:
        subspace = put(cache, weight)
    finally:
        os.umask(before)
    path = only_file(cache.folder)
    for made in (path, cache.folder):
        assert not made.stat().st_mode & 0o022
    assert same(cache.get(weight, 4), subspace)
    path.chmod(0o664)
    assert cache.get(weight, 4) is None
    put(cache, weight)
    assert cache.get(weight, 4) is not None


# How much it holds


def test_the_longest_unused_go_first(tmp_path):
    weights = [torch.randn(24, 30) for _ in range(6)]
    put(SubspaceCache(tmp_path), weights[0])
    each = only_file(tmp_path).stat().st_size
    cache = SubspaceCache(tmp_path, 3 * each + each // 2)
    paths = [cache.path(content_hash(weight), 4) for weight in weights]
    (tmp_path / "thesis.safetensors").write_bytes(bytes(10 * each))  # not the cache's

    def held():
        return [index for index, path in enumerate(paths) if path.exists()]

    for i, expected in ((1, [0, 1]), (2, [0, 1, 2]), (3, [0, 2, 3]), (4, [0, 3, 4])):
        for index in held():
            os.utime(paths[index], (index + 2, index + 2))
        assert cache.get(weights[0], 4) is not None  # used: not the first to go
        put(cache, weights[i])
        assert held() == expected
    assert (tmp_path / "thesis.safetensors").exists()
    put(SubspaceCache(tmp_path, each), weights[5])  # a new one counts what it finds
    assert held() == [5]
    put(SubspaceCache(tmp_path / "none", 0), weights[0])  # larger than the whole cache
    assert not [*(tmp_path / "none").iterdir()]
