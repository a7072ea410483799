"""A lock that one process holds at a time, and whose file is gone afterwards."""

import os

import pytest

from mica.cli import lock


def test_one_holder_at_a_time(tmp_path):
    path = tmp_path / "lock"
    with lock.held(path):
        with pytest.raises(lock.HeldError), lock.held(path):
            pass
        assert path.exists()
    assert not path.exists()
    with lock.held(path):
        pass


def test_who_locks_a_file_that_was_removed_meanwhile_tries_again(tmp_path, monkeypatch):
    """Between its opening and its locking the holder before it has removed the file and let it go."""
    path = tmp_path / "lock"
    acquire, opened = lock._lock, []

    def late(descriptor):
        opened.append(os.fstat(descriptor).st_ino)
        if len(opened) == 1:
            path.unlink()
        acquire(descriptor)

    monkeypatch.setattr(lock, "_lock", late)
    with lock.held(path):
        assert len(opened) == 2
        assert path.stat().st_ino == opened[1]
        monkeypatch.undo()
        with pytest.raises(lock.HeldError), lock.held(path):
            pass


def test_a_file_system_without_locks_is_as_nobody_else(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with lock.held(tmp_path / "lock"), lock.held(tmp_path / "lock"):
        pass


def test_a_killed_holder_is_none(tmp_path):
    (tmp_path / "lock").write_text("left by a killed process")
    with lock.held(tmp_path / "lock"):
        pass
    with pytest.raises(FileNotFoundError), lock.held(tmp_path / "gone" / "lock"):
        pass
