"""What is in a folder, by content: what was lost or changed between two moments is seen without a record."""

import hashlib
import os
from pathlib import Path

Snapshot = dict[str, str]  # path below the folder, with "/" -> what is there
FOLDER = "a folder"


def taken(folder: Path) -> Snapshot:
    """Files by a hash of their bytes, links by where they lead, and folders. Nothing is followed.

    What vanishes while it is read, as another process works there, is left out.
    """
    found: Snapshot = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            what = _what(path)
            if what is not None:
                found[os.path.relpath(path, folder)] = what
    return found


def _what(path: str) -> str | None:
    try:
        if os.path.islink(path):
            return f"-> {os.readlink(path)}"
        if os.path.isdir(path):
            return FOLDER
        with open(path, "rb") as file:
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()
    except FileNotFoundError:
        return None


def altered(before: Snapshot, after: Snapshot) -> set[str]:
    """Paths that are gone, or hold something else."""
    return {path for path, what in before.items() if after.get(path) != what}


def added(before: Snapshot, after: Snapshot) -> set[str]:
    return after.keys() - before.keys()
