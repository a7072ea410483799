"""Ctrl-C and SIGTERM: a run that is training stops after its step, any other at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], None]


class Stopped(KeyboardInterrupt):
    """The run was told to stop, and has. ``signum``: the signal; ``status``: the exit status, 130 or 143."""

    def __init__(self, signum: int):
        self.signum = signal.Signals(signum)
        super().__init__(self.signum.name)

    @property
    def status(self) -> int:
        return 128 + self.signum


def status(name: str) -> int:
    """The exit status after the signal ``name``: 130 for "SIGINT", 143 for "SIGTERM"."""
    return Stopped(signal.Signals[name]).status


@contextmanager
def at_once() -> Iterator[None]:
    """Within it both signals raise Stopped: for the parts of a run that have nothing to save."""

    def stop(signum, frame):
        raise Stopped(signum)

    with _handled(stop):
        yield


def name_of(signum: int) -> str | None:
    """As "SIGINT"; None for 0."""
    return signal.Signals(signum).name if signum else None


class Request:
    """The first signal that asked to stop, noted for the training loop, which asks after every step."""

    def __init__(self, repeats_stop: bool, announce: Callable[[str], None]):
        """``repeats_stop``: another Ctrl-C raises Stopped. ``announce(name)`` is called for the first signal.

        Repeats must not stop one of several processes: a terminal and torchrun both send Ctrl-C to each.
        """
        self.signum = 0
        self._repeats_stop = repeats_stop
        self._announce = announce

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        if not self.signum:
            self.signum = signum
            self._announce(signal.Signals(signum).name)
        elif self._repeats_stop and signum == signal.SIGINT:
            raise Stopped(signum)

    @contextmanager
    def heeded(self) -> Iterator["Request"]:
        """Within it both signals are noted; afterwards they do again what they did before."""
        with _handled(self.note):
            yield self


def say(text: str) -> None:
    """Write a line to standard error from a signal handler, where Python's own buffers may be in use."""
    with suppress(OSError):  # closed: the terminal has gone
        os.write(2, f"\n{text}\n".encode())


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    """``handler`` for both signals. Outside of the main thread Python allows none: nothing is changed then.

    A signal that was ignored from the start (``nohup``, a background job of a shell) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    ours = [signum for signum in SIGNALS if before[signum] not in (signal.SIG_IGN, None)]
    for signum in ours:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum in ours:
            signal.signal(signum, before[signum])
