"""What commands have written into an output folder: they replace and remove nothing else there."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mica.errors import UsageError

NAME = ".mica.written"  # of the file in the folder


class NotOwnError(UsageError):
    """A file is in the way that no command has written, or that somebody has changed since."""


def digest(path: Path, start: bytes = b"") -> bytes:
    """16 bytes: the hash of ``start`` and all of a file, at 1 GB/s."""
    total = hashlib.blake2b(start, digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            total.update(chunk)
    return total.digest()


class Record:
    """The files below ``folder`` that commands have written, by name, with a hash of what each may hold.

    A name is recorded before its file is there, so that a kill leaves no file unknown: until it is there,
    the hashes of the old and of the new content count.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> set[str]:
        """Paths relative to the folder, with "/"."""
        return self._read().keys()

    def below(self, folder: Path) -> list[str]:
        """The names of what was written into ``folder``, which is in that of the record."""
        return [name for name in self._read() if folder in (self.folder / name).parents]

    def has(self, path: Path) -> bool:
        """Whether ``path`` is a file that holds what a command has written there."""
        return _hash(path) in self._read().get(self._name(path), ())

    def claim(self, contents: dict[Path, Path]) -> None:
        """Record files that are about to be written: path -> the file that is to be moved there.

        Raises NotOwnError, and records nothing, if one of the paths holds what no command has written, unless
        it is the same as the new content. OSError if the record cannot be written.
        """
        record = self._read()
        for path, source in contents.items():
            new, old = _hash(source), _hash(path)
            _check(path, [new, *record.get(self._name(path), ())])
            record[self._name(path)] = [each for each in (old, new) if each is not None]
        self._write(record)

    def place(self, contents: dict[Path, Path]) -> None:
        """`claim`, and move the files there: each after a last look at what it replaces."""
        self.claim(contents)
        record = self._read()
        for path, source in contents.items():
            path.parent.mkdir(exist_ok=True)
            _check(path, record[self._name(path)])
            os.replace(source, path)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that still hold what commands have written, and then folders that are empty.

        Raises nothing: what cannot be removed stays recorded.
        """
        names = list(names)
        if not names:
            return
        with suppress(OSError):
            record = self._read()
            for name in names:
                path = self.folder / name
                if _hash(path) in record.get(name, ()):
                    path.unlink()
                if not os.path.lexists(path):
                    record.pop(name, None)
                    _remove_empty(path.parent, self.folder)
            self._write(record)

    def forget(self) -> None:
        """Remove the record itself, because no command will write to this folder again."""
        (self.folder / NAME).unlink(missing_ok=True)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _read(self) -> dict[str, list[str]]:
        """Empty where there is no record, or it cannot be understood: then nothing is a command's own."""
        with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
            found = json.loads((self.folder / NAME).read_bytes())
            return {name: list(hashes) for name, hashes in found.items() if _is_inside(name)}
        return {}

    def _write(self, record: dict[str, list[str]]) -> None:
        if not record:
            self.forget()
            return
        path = self.folder / NAME
        scratch = path.with_name(f"{NAME}.partial")
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)


def _check(path: Path, hashes: Iterable[str | None]) -> None:
    """Raise NotOwnError if something else than a file with one of ``hashes`` is at ``path``."""
    if os.path.lexists(path) and _hash(path) not in hashes:
        raise NotOwnError(f"{path} is not what mica has written there: move it away")


def _hash(path: Path) -> str | None:
    """The hash of a file's content, or None if there is no file that can be read."""
    with suppress(OSError):
        return digest(path).hex()
    return None


def _is_inside(name: str) -> bool:
    """Whether ``name`` stays in its folder, which may come from others, with the record in it."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _remove_empty(folder: Path, last: Path) -> None:
    """Remove ``folder`` and those above it, as long as they are empty and below ``last``."""
    with suppress(OSError):
        while folder != last:
            folder.rmdir()
            folder = folder.parent
