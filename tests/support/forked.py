"""A ``mica`` command in a process of its own, forked from the server, and what befalls it on its way.

It begins within 0.1 s, as the server has imported what it needs. A blow falls at a certain event, before the
system does what was asked of it: the same seed kills or stops a run at the same place again.
"""

import gc
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import datasets.config
import torch
from transformers import Trainer

from mica.cli import main, transfer  # noqa: F401 (imported before the fork)
from mica.cli.adapt import session  # noqa: F401 (the same)
from tests.support.server import SERVER

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree")
_DEADLINE = 900.0  # seconds; what takes longer hangs, on the busiest machine


class Blow(NamedTuple):
    """``what``, a signal's name, at the ``at``-th event ``where``; ``delay`` seconds later.

    Events count from the blow before on. ``where``: "write" (what changes something in the folder) or "step"
    (of the training).
    """

    where: str
    at: int
    what: str
    delay: float = 0.0


def run(
    argv: Sequence[str], folder: Path, log: Path, cache: Path, blows: Sequence[Blow] = ()
) -> tuple[int, str]:
    """``mica`` with ``argv`` in ``folder``: its exit status, negative for a signal, and what it has printed.

    ``log``: a path for all of that, outside of the scene; ``cache``: for tokens, also outside.

    Raises:
        TimeoutError: it hangs.
    """
    process = SERVER.Process(target=_enter, args=(list(argv), folder, log, cache, list(blows)))
    process.start()
    process.join(_DEADLINE)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{argv} hangs:\n{text}")
    return process.exitcode, text


def _enter(argv, folder, log, cache, blows):
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing's children ignore it
    torch.set_num_threads(1)
    gc.freeze()  # or Trainer's collection looks through all that is imported: most of a tiny run's time
    datasets.config.HF_DATASETS_CACHE = cache
    _Watch(str(folder), blows)
    status = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Watch:
    """Counts the events of this process, and deals the blows."""

    def __init__(self, folder: str, blows: list[Blow]):
        self.folder, self.blows = folder, blows
        self.since = Counter()  # the last blow
        step = Trainer.training_step

        def counted(*args, **kwargs):
            self.count("step")
            return step(*args, **kwargs)

        Trainer.training_step = counted
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple) -> None:
        is_write = event in CHANGES or (event == "open" and _writes(args))
        if is_write and self._is_inside(args[0]):
            self.count("write")

    def _is_inside(self, path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        text = os.fsdecode(path)
        return text.startswith(self.folder) or not os.path.isabs(text)

    def count(self, kind: str) -> None:
        self.since[kind] += 1
        if self.blows and self.blows[0].where == kind and self.since[kind] >= self.blows[0].at:
            blow = self.blows.pop(0)
            self.since.clear()
            signum = signal.Signals[blow.what]
            if blow.delay:
                threading.Timer(blow.delay, os.kill, (os.getpid(), signum)).start()
            else:
                os.kill(os.getpid(), signum)


def _writes(args: tuple) -> bool:
    """Whether an "open" event is one for writing; ``os.open`` has flags and no mode."""
    _, mode, flags = args
    if mode is None:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return bool(set(mode) & set("wax+"))
