"""Results as files, one each, and the work that several processes share by locks on their names.

A result is written beside its name and renamed: after kill -9 it is there whole or not at all, and the system
has released the lock of who was making it.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import filelock

from mica.cli.output import explained, write_json

_PAUSE = 0.2  # seconds between looks at what others have done


class Named(Protocol):
    """What a result is made of. ``key``: the name of its file, without the suffix."""

    @property
    def key(self) -> str: ...


Job = TypeVar("Job", bound=Named)


def read(folder: Path) -> dict[str, Any]:
    """key -> result, of all that are whole, in the order of their keys.

    Raises UsageError for a file that is not JSON.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        with explained(f"{path}: cannot be read: remove it, and its training is done again", ValueError):
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return found


def work(
    folder: Path,
    planned: Callable[[dict[str, Any]], list[Job]],
    make: Callable[[Job], dict],
    seen: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Make what ``planned(results)`` names until it names nothing more, and return all results.

    Every process calls it with its own ``make``; each result is made by one of them. ``planned`` must follow
    from the results alone. ``seen`` gets them before each next piece of work.
    """
    while True:
        results = read(folder)
        seen(results)
        todo = planned(results)
        if not todo:
            return results
        if not any(_made(folder, one, make) for one in todo):
            time.sleep(_PAUSE)  # others are at all of them


def _made(folder: Path, one: Named, make: Callable[[Named], dict]) -> bool:
    """Whether this process has made the result now; another may be at it, or have finished it."""
    path = folder / f"{one.key}.json"
    lock = filelock.FileLock(folder / f"{one.key}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    try:
        if not path.exists():
            write_json("--output", path, make(one))
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
    return True
