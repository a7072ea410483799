"""Of the cache: whose folder it uses, and how much it keeps there."""

import os

import pytest
import torch

from mica.subspace.cache import SubspaceCache
from mica.subspace.fingerprint import fingerprint
from tests.support.subspaces import only_file, same, solved

# Whom it trusts


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_not_used_and_said_once(cache, weight, caplog, mode):
    cache.put(weight, solved(weight, 4))
    cache.folder.chmod(mode)
    for reader in (cache, SubspaceCache(cache.folder)):
        assert reader.get(weight, 4) is None
        reader.put(weight, solved(weight, 5))
    (message,) = messages(caplog)
    assert str(cache.folder) in message
    assert f"written by others (mode {mode:o})" in message
    assert "MICA_CACHE" in message
    only_file(cache.folder)
    cache.folder.chmod(0o755)
    assert same(cache.get(weight, 4), solved(weight, 4))


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_nor_is_one_of_another_user(cache, weight, caplog, monkeypatch):
    cache.put(weight, solved(weight, 4))
    owner = os.stat(cache.folder).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner:  # root's is everybody's friend
        assert cache.get(weight, 4) is None
        (message,) = messages(caplog)
        assert f"belongs to another user ({owner})" in message
    else:
        assert cache.get(weight, 4) is not None
        os.chown(cache.folder, 12345, -1)
        monkeypatch.undo()
        assert cache.get(weight, 4) is None
        (message,) = messages(caplog)
        assert "belongs to another user (12345)" in message
        os.chown(cache.folder, 0, -1)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_file_that_others_can_write_is_a_miss(cache, weight):
    cache.put(weight, solved(weight, 4))
    only_file(cache.folder).chmod(0o664)
    assert cache.get(weight, 4) is None
    cache.put(weight, solved(weight, 4))
    assert cache.get(weight, 4) is not None


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_what_it_makes_it_trusts(cache, weight, umask):
    before = os.umask(umask)
    try:
        cache.put(weight, solved(weight, 4))
    finally:
        os.umask(before)
    assert not only_file(cache.folder).stat().st_mode & 0o022
    assert not cache.folder.stat().st_mode & 0o022
    assert same(cache.get(weight, 4), solved(weight, 4))


# How much it holds


def test_the_longest_unused_go_first(tmp_path, weight):
    weights = [torch.randn(24, 30) for _ in range(6)]
    cache = SubspaceCache(tmp_path)
    cache.put(weights[0], solved(weights[0], 4))
    each = only_file(tmp_path).stat().st_size
    cache = SubspaceCache(tmp_path, 3 * each + each // 2)
    (tmp_path / "thesis.safetensors").write_bytes(bytes(10 * each))  # not the cache's
    of_version_1 = tmp_path / f"{'0a' * 20}.safetensors"
    of_version_1.write_bytes(bytes(each))
    os.utime(of_version_1, (1, 1))

    def held():
        return [i for i in range(6) if cache.path(fingerprint(weights[i]), 4).exists()]

    for i, expected in ((1, [0, 1]), (2, [0, 1, 2]), (3, [0, 2, 3]), (4, [0, 3, 4])):
        for index in held():
            os.utime(cache.path(fingerprint(weights[index]), 4), (index + 2, index + 2))
        assert cache.get(weights[0], 4) is not None  # used: not the first to go
        cache.put(weights[i], solved(weights[i], 4))
        assert held() == expected
        assert of_version_1.exists() == (i == 1)
    assert (tmp_path / "thesis.safetensors").exists()
    other = SubspaceCache(tmp_path, each)  # a new one counts what it finds
    other.put(weights[5], solved(weights[5], 4))
    assert held() == [5]


def test_what_is_larger_than_the_whole_cache_is_not_kept(cache, weight):
    none = SubspaceCache(cache.folder, 0)
    none.put(weight, solved(weight, 4))
    assert not cache.folder.exists()
