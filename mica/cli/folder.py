"""The output folder of a command: new or empty, or that of a run that goes on; one command at a time.

A command replaces and removes only what commands have written there: see `mica.cli.record`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from mica.cli import record
from mica.cli.output import SCRATCH, explained
from mica.errors import UsageError

LOCK = ".mica.lock"  # held by the command that writes there


def entries(output: Path) -> list[str]:
    """The names in ``output`` but those of lock and record; sorted. None where there is no such folder."""
    if not output.is_dir():
        return []
    return sorted(name for name in os.listdir(output) if name not in (LOCK, record.NAME))


def is_unfinished(folder: Path) -> bool:
    """Whether `output.write_folder` was killed as it wrote ``folder``."""
    return (folder / SCRATCH).is_dir()


def check_begun(output: Path, name: str) -> None:
    """Raise UsageError if there is nothing in ``output`` that could be resumed: no file of this name."""
    if not (output / name).is_file():
        raise UsageError(f"--resume: nothing to continue in {output}: there is no {name}")


def check_new(option: str, folder: Path, remedy: str = "choose another folder") -> None:
    """Raise UsageError if ``folder`` holds anything but half of what a killed command has written."""
    found = entries(folder)
    if found and not is_unfinished(folder):
        raise UsageError(f"{option} {folder}: is not empty: {remedy}")


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Make ``output``, and keep other commands out of it.

    The system releases the lock of a killed process. A torchrun that is killed with -9, for one, leaves its
    workers, which go on training. Folders that were made and stay empty are removed again.

    Raises UsageError if another command holds it, or it cannot be made.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]
    lock = filelock.FileLock(output / LOCK)
    try:
        with explained(f"--output {output}: cannot be made", OSError):  # /proc, for one, looks writable
            output.mkdir(parents=True, exist_ok=True)
            _acquire(lock, output)
        try:
            yield
        finally:
            with suppress(OSError):
                os.remove(lock.lock_file)
            lock.release()
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _acquire(lock: filelock.FileLock, output: Path) -> None:
    with suppress(NotImplementedError):  # a file system without locks, by older releases of filelock
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UsageError(
                f"--output {output}: another command writes to it; wait for it or stop it"
            ) from error


@contextmanager
def undo_on_error(output: Path) -> Iterator[None]:
    """Remove what commands have written to ``output`` within, if that is left by an exception."""
    written = record.Record(output)
    before = written.names()
    try:
        yield
    except BaseException:
        written.remove(written.names() - before)
        raise
