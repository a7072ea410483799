"""Compilers that take no time: scripts in the place of a C++ compiler, which note that they have run."""

import shlex
import time
from pathlib import Path

_SCRIPT = """#!/bin/sh
echo "$*" >> {runs}
echo $$ > {pid}
for word; do
    [ "$last" = -o ] && output="$word"
    last="$word"
done
{body}
"""


class Compiler:
    """A script in this folder. ``body``: what it does, in sh, with the path that follows -o as "$output"."""

    def __init__(self, folder: Path, body: str):
        folder.mkdir()
        self.path = folder / "compiler"
        self._runs = folder / "runs"
        self._pid = folder / "pid"
        self.does(body)

    def does(self, body: str) -> None:
        """Replace what it does."""
        places = {"runs": shlex.quote(str(self._runs)), "pid": shlex.quote(str(self._pid))}
        self.path.write_text(_SCRIPT.format(body=body, **places))
        self.path.chmod(0o755)

    def runs(self) -> list[str]:
        """The arguments of each run."""
        return self._runs.read_text().splitlines() if self._runs.exists() else []

    def pid(self) -> int:
        """That of the last run, which is awaited."""
        return int(awaited(self._pid))


def copying(module: Path) -> str:
    """What a compiler does that has this module ready."""
    return f'cp {shlex.quote(str(module))} "$output"'


def awaited(path: Path) -> str:
    """The first line of a file that another process writes."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text().splitlines()[0]
        time.sleep(0.01)
    raise TimeoutError(f"{path} has not been written")


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and that nobody has asked for is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state not in ("Z", "X")


def has_ended(pid: int) -> bool:
    """Whether it ends within 20 seconds."""
    limit = time.monotonic() + 20
    while is_running(pid):
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


def names(folder: Path, ending: str) -> list[str]:
    """Those of the files in a folder that end so."""
    return sorted(path.name for path in folder.glob(f"*{ending}"))
