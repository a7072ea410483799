"""What the cache gives back and keeps, with damaged files and bad disks, whom it trusts, and its settings."""

import logging
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from mica.dtypes import FLOATING
from mica.subspace import cache as cache_module
from mica.subspace.cache import SubspaceCache, default_cache
from tests.mica.subspace.subspaces import get, only_file, put, same


@pytest.fixture
def weight():
    return torch.randn(24, 30)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (7, 5), (1, 9), (9, 1)])
def test_round_trip(cache, shape, dtype):
    """A result outlives its file and its successor."""
    weight, other = (torch.randn(shape).to(dtype) for _ in range(2))
    rank = min(4, *shape)
    assert get(cache, weight, rank) is None
    put(cache, weight, rank, method="gram")
    subspace = put(cache, weight, rank)
    loaded = [get(reader, weight, rank) for reader in (cache, SubspaceCache(str(cache.folder)))]
    assert get(cache, other, rank) is None
    only_file(cache.folder).unlink()
    for result in loaded:
        assert result is not subspace
        assert result.basis.dtype == result.singular_values.dtype == subspace.basis.dtype
        result.basis.mul_(1)  # writable
        assert same(result, subspace)


def test_what_is_stored_for_one_rank_answers_no_other(cache, weight):
    """The last columns of a larger rank's basis span the subspace too, but their bits are others."""
    put(cache, weight, 8)
    for rank in (4, 0, -1, 9, 1000):
        assert get(cache, weight, rank) is None
    assert same(put(cache, weight, 4), get(cache, weight, 4))


@pytest.mark.parametrize("changes", [{"certified": False}, {"null_count": 1}])
def test_what_is_not_worth_keeping(cache, weight, changes):
    put(cache, weight, **changes)
    assert not cache.folder.exists()
    assert get(cache, weight) is None


# Damage


def flipped(content, mask):
    for place, byte in enumerate(content):
        yield content[:place] + bytes([byte ^ mask]) + content[place + 1 :]


OF_ANOTHER_USER = {"basis": torch.eye(3, 2), "singular_values": torch.ones(2)}
DAMAGED = {
    "truncated": lambda content: [*(content[:length] for length in range(len(content))), content + b"\0"],
    **{f"flipped by {m:x}": lambda content, m=m: flipped(content, m) for m in (0x01, 0x80)},
    "garbage": lambda _: [b"\0" * 8, b"\xff" * 64, b"\2" + b"\0" * 7 + b"[]", b"[" * 100_000],
    "well-formed": lambda _: [safetensors.torch.save(OF_ANOTHER_USER)],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_any_damage_is_a_miss_and_the_next_put_repairs(cache, damage):
    weight = torch.randn(3, 4)
    put(cache, weight, 2)
    path = only_file(cache.folder)
    for place, damaged in enumerate(DAMAGED[damage](path.read_bytes())):
        path.write_bytes(damaged)
        assert get(cache, weight, 2) is None, place
    assert same(put(cache, weight, 2), get(cache, weight, 2))


def test_a_warning_a_file_and_none_of_a_miss(cache, weight, caplog):
    caplog.set_level(logging.WARNING, "mica")
    assert get(cache, weight) is None
    put(cache, weight)
    assert get(cache, weight, 5) is None
    assert not caplog.records
    path = only_file(cache.folder)
    path.write_bytes(b"nonsense")
    assert get(cache, weight) is None
    assert get(cache, weight) is None
    (message,) = caplog.messages
    assert str(path) in message
    assert "recomputed" in message


def test_a_file_of_another_version_is_a_miss(cache, weight, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
        put(cache, weight)
    assert get(cache, weight) is None


# Disks


def test_a_folder_that_cannot_be_is_said_once(tmp_path, weight, caplog):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        caplog.clear()
        for cache in (SubspaceCache(folder), SubspaceCache(folder)):
            assert get(cache, weight) is None
            put(cache, weight)
            assert get(cache, weight) is None
        (message,) = caplog.messages
        assert str(folder) in message
        assert "not cached" in message
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_full_disk_leaves_nothing_behind(cache, weight, monkeypatch, failing):
    old = put(cache, weight, method="gram")

    def fail(path, content):
        if failing == "write":
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*{"write": (Path, "write_bytes"), "replace": (Path, "replace")}[failing], fail)
        put(cache, weight)
    only_file(cache.folder)
    assert same(get(cache, weight), old)
    assert same(put(cache, weight), get(cache, weight))


def test_a_writer_between_the_writing_and_the_renaming_of_another(cache, weight, monkeypatch, caplog):
    rename = Path.replace

    def late(path, target):
        monkeypatch.undo()
        put(cache, weight, method="gram")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", late)
    assert same(put(cache, weight), get(cache, weight))
    only_file(cache.folder)
    assert not caplog.records


# Whom it trusts

on_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


@on_posix
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_not_used_and_said_once(cache, weight, caplog, mode):
    subspace = put(cache, weight)
    cache.folder.chmod(mode)
    for reader in (cache, SubspaceCache(cache.folder)):
        assert get(reader, weight) is None
        put(reader, weight, 5)
    (message,) = caplog.messages
    for part in (str(cache.folder), f"written by others (mode {mode:o})", "MICA_CACHE"):
        assert part in message
    only_file(cache.folder)
    cache.folder.chmod(0o755)
    assert same(get(cache, weight), subspace)


@on_posix
def test_nor_is_one_of_another_user(cache, weight, caplog, monkeypatch):
    put(cache, weight)
    owner = other = os.stat(cache.folder).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if not owner:  # root's is everybody's friend
        assert get(cache, weight) is not None
        other = 12345
        os.chown(cache.folder, other, -1)
        monkeypatch.undo()
    assert get(cache, weight) is None
    (message,) = caplog.messages
    assert f"belongs to another user ({other})" in message
    os.chown(cache.folder, owner, -1)


@on_posix
@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_what_it_makes_others_cannot_write(cache, weight, umask):
    before = os.umask(umask)
    try:
        subspace = put(cache, weight)
    finally:
        os.umask(before)
    for made in (only_file(cache.folder), cache.folder):
        assert not made.stat().st_mode & 0o022
    assert same(get(cache, weight), subspace)


# The environment


@pytest.mark.parametrize(
    ("setting", "folder"),
    [
        *((off, None) for off in ("0", "", "off", "OFF", "False", "no", " 0 ")),
        *((on, "hub/mica") for on in (None, "1", "on", "True", "YES")),
        ("{}/a b", "a b"),
        ("~/c", "c"),
    ],
)
def test_its_folder_is_read_at_call_time(monkeypatch, tmp_path, weight, setting, folder):
    """Next to the hub by default."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MICA_CACHE", "~nobody-of-that-name/d")
    assert get(default_cache(), weight) is None
    if setting is None:
        monkeypatch.delenv("MICA_CACHE")
    else:
        monkeypatch.setenv("MICA_CACHE", setting.format(tmp_path))
    if folder is None:
        assert default_cache() is None
        return
    assert default_cache().folder == tmp_path / folder
    assert not list(tmp_path.iterdir())
    put(default_cache(), weight)
    assert get(default_cache(), weight) is not None
    assert (tmp_path / folder).is_dir()
