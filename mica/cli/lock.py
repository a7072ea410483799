"""A lock among processes, as a file that is there while the lock is held.

Removing a lock's file is a race: a process that opened it before, and locks it after that, holds a file that
nobody else can find. So a process that has locked a file checks that it still is the one of that name.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None
try:
    import msvcrt
except ModuleNotFoundError:  # elsewhere
    msvcrt = None


class HeldError(Exception):
    """Another process holds the lock."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock ``path``, a file that is made for it and removed afterwards.

    The system releases the lock of a killed process, whose file stays and may be locked again. A file system
    without locks is as if nobody else were there.

    Raises HeldError if another process holds it; OSError if the file cannot be made.
    """
    descriptor = _acquired(path)
    try:
        yield
    finally:
        if msvcrt is not None:  # Windows removes no open file
            os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        if msvcrt is None:
            os.close(descriptor)


def _acquired(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            if _is_of(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed the file meanwhile: try the new one


def _is_of(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> None:
    try:
        if msvcrt is not None:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        elif fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise HeldError from error
    except OSError:  # a file system without locks
        pass
