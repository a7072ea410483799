"""A ``mica`` command in a process of its own, forked from the server, and what befalls it on its way.

It begins within 0.1 s, as the server has imported what it needs. A blow falls at a certain event, before the
system does what was asked of it: the same seed kills or stops a run at the same place again.
"""

import errno
import gc
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import datasets.config
import torch
from transformers import Trainer

from mica.cli import main, transfer  # noqa: F401 (imported before the fork)
from mica.cli.adapt import curve, session  # noqa: F401 (the same)
from tests.support.server import SERVER

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree")
LOOKS = ("os.listdir", "os.scandir")
FULL_DISK = "full disk"
PUT = "put "
STOPPED = ".stopped"
COUNTS = ".counts"
_DEADLINE = 900.0  # seconds; what takes longer hangs, on the busiest machine
_GLANCE = 0.005


class Blow(NamedTuple):
    """``what``, a signal's name, `FULL_DISK` or "put PATH", at the ``at``-th event ``where``.

    A signal ``delay`` seconds later. "put PATH": a stranger's file appears there, in the scene.

    Events count from the blow before on. ``where``: "file" (whatever is opened, listed or changed in the
    scene), "write" (of these what changes something) or "step" (of the training).
    """

    where: str
    at: int
    what: str
    delay: float = 0.0


class Command:
    """``mica`` with ``argv`` in ``folder``, running. ``log``: a path, outside of the scene.

    ``cache``: for tokens; also outside.
    """

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        log: Path,
        cache: Path,
        blows: Sequence[Blow] = (),
    ):
        self.argv, self.log = list(argv), log
        arguments = (self.argv, folder, log, cache, list(blows))
        self._process = SERVER.Process(target=_enter, args=arguments)
        self._process.start()
        self._was_stopped = False

    def wait_until_stopped(self) -> bool:
        """Until a blow has stopped it; False: it has ended before."""
        marker = Path(f"{self.log}{STOPPED}")
        limit = time.monotonic() + _DEADLINE
        while not marker.exists():
            if self.has_ended(_GLANCE):
                return False
            if time.monotonic() > limit:
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"{self.argv} hangs:\n{self.text()}")
        self._was_stopped = True
        return True

    def has_ended(self, timeout: float = 0.0) -> bool:
        return bool(multiprocessing.connection.wait([self._process.sentinel], timeout=timeout))

    def kill(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signum)

    def end(self) -> int:
        """Its exit status, negative for a signal; a stopped one goes on first. One that hangs is an error."""
        begin = time.monotonic()
        while not self.has_ended(0.05):
            if self._was_stopped:
                self.kill(signal.SIGCONT)  # again, should the first have come before the stop
            if time.monotonic() > begin + _DEADLINE:
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"{self.argv} hangs:\n{self.text()}")
        self._process.join()
        return self._process.exitcode

    def text(self) -> str:
        """All that it has printed."""
        if not self.log.exists():
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def strangers(self) -> list[str]:
        """The files that were put into the scene meanwhile."""
        log = Path(f"{self.log}.put")
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []

    def counts(self) -> Counter:
        """How many events of each kind there were, and how long it took, of one that was not killed."""
        words = Path(f"{self.log}{COUNTS}").read_text().split()
        return Counter(dict(zip(words[::2], map(int, words[1::2]), strict=True)))


def be_quick(cache: Path) -> None:
    """What takes most of a tiny run's time and is not tested here is left out, in this process."""
    torch.set_num_threads(1)
    gc.freeze()  # or Trainer's collection looks through all that is imported
    curve.figure = lambda *_: SimpleNamespace(savefig=lambda path, **_: path.write_bytes(b"a picture"))
    datasets.config.HF_DATASETS_CACHE = cache


def _enter(argv, folder, log, cache, blows):
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing's children ignore it
    be_quick(cache)
    begin = time.monotonic()
    watch = _Watch(str(folder), log, blows)
    status = main(argv)
    watch.is_off = True
    watch.counts["milliseconds"] = round(1000 * (time.monotonic() - begin))
    Path(f"{log}{COUNTS}").write_text(" ".join(f"{kind} {count}" for kind, count in watch.counts.items()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Watch:
    """Counts the events of this process, and deals the blows."""

    def __init__(self, folder: str, log: Path, blows: list[Blow]):
        self.folder, self.log, self.blows = folder, log, list(blows)
        self.counts = Counter()
        self.since = Counter()  # the last blow
        self.is_off = self.is_full = False
        self.names: set[str] = set()  # of the files that the present event is about
        step = Trainer.training_step

        def counted(*args, **kwargs):
            self.count("step")
            return step(*args, **kwargs)

        Trainer.training_step = counted
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple) -> None:
        if self.is_off or not (event == "open" or event in CHANGES or event in LOOKS):
            return
        if not self._is_inside(args[0]):
            return
        self.names = {os.path.basename(str(arg)) for arg in args}
        is_write = event in CHANGES or (event == "open" and _writes(args))
        self.count("file")
        if is_write:
            self.count("write")
            if self.is_full and event in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(args[0]))

    def _is_inside(self, path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        text = os.fsdecode(path)
        return text.startswith(self.folder) or not os.path.isabs(text)

    def count(self, kind: str) -> None:
        self.counts[kind] += 1
        self.since[kind] += 1
        if self.blows and self.blows[0].where == kind and self.since[kind] >= self.blows[0].at:
            blow = self.blows.pop(0)
            self.since.clear()
            self._deal(blow)

    def _deal(self, blow: Blow) -> None:
        if blow.what == FULL_DISK:
            self.is_full = True
            return
        if blow.what.startswith(PUT):
            self._put(blow)
            return
        signum = signal.Signals[blow.what]
        if signum == signal.SIGSTOP:
            os.close(os.open(f"{self.log}{STOPPED}", os.O_WRONLY | os.O_CREAT))
        if blow.delay:
            threading.Timer(blow.delay, os.kill, (os.getpid(), signum)).start()
        else:
            os.kill(os.getpid(), signum)

    def _put(self, blow: Blow) -> None:
        """Not at an event about that file: nobody can be seen who comes between a look and a rename."""
        path = Path(self.folder, blow.what.removeprefix(PUT))
        if path.name in self.names:
            self.blows.insert(0, blow._replace(at=1))
            return
        self.is_off = True
        with suppress(OSError):  # its folder is a file, or goes at this moment
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{PUT}{path.name}", encoding="utf-8")
            with open(f"{self.log}.put", "a", encoding="utf-8") as file:
                file.write(f"{blow.what.removeprefix(PUT)}\n")
        self.is_off = False


def _writes(args: tuple) -> bool:
    """Whether an "open" event is one for writing; ``os.open`` has flags and no mode."""
    _, mode, flags = args
    if mode is None:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return bool(set(mode) & set("wax+"))
