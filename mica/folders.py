"""Folders that the environment names, whether to trust what lies in them, and files written whole."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path

_OFF = ("", "0", "off", "false", "no")
_ON = ("1", "on", "true", "yes")


def named_folder(setting: str, default: Path) -> Path | None:
    """The folder that the value of an environment variable names; None where it says that there is none."""
    word = setting.strip().lower()
    if word in _OFF:
        return None
    if word in _ON:
        return default
    return Path(os.path.expanduser(setting))  # pathlib's raises where there is no home


def why_untrusted(path: str | os.PathLike[str]) -> str | None:
    """Why other users may have written to a file or folder, such as "belongs to another user (1000)".

    None if they cannot have, or if there is no such file. Only POSIX systems are checked.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if os.name != "posix":
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to another user ({status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: as a temporary file, which is renamed when it is complete.

    Without fsync, which takes up to 10 ms.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(mode=0o644)  # even if the umask lets others write
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # it exists only after a failure
