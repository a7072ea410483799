"""Ctrl-C and SIGTERM: a run that is training stops after its step, any other at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def status(name: str) -> int:
    """The exit status after the signal ``name``: 130 for "SIGINT", 143 for "SIGTERM"."""
    return 128 + signal.Signals[name]


@contextmanager
def at_once() -> Iterator[None]:
    """Within it SIGTERM raises SystemExit(143), as Ctrl-C KeyboardInterrupt: what is held is let go."""

    def stop(signum, frame):
        raise SystemExit(128 + signum)

    with _handled(stop, signal.SIGTERM):
        yield


class Request:
    """The first signal that asked to stop, noted as ``signum`` for the training loop; 0 before."""

    def __init__(self, alone: bool, speaks: bool):
        """``alone``: the only process, so another Ctrl-C raises KeyboardInterrupt. ``speaks``: says so.

        Repeats must not stop one of several processes: a terminal and torchrun both send Ctrl-C to each.
        """
        self.signum = 0
        self._alone, self._speaks = alone, speaks

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        if self.signum:
            if self._alone and signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signum = signum
        if self._speaks:
            again = "; Ctrl-C again stops at once" if self._alone and signum == signal.SIGINT else ""
            name = signal.Signals(signum).name
            text = f"\nmica adapt: {name}: finishing this step and saving a checkpoint{again}\n"
            with suppress(OSError):  # closed: the terminal has gone
                os.write(2, text.encode())  # Python's own buffers may be in use

    @contextmanager
    def heeded(self) -> Iterator["Request"]:
        """Within it both signals are noted; afterwards they do again what they did before."""
        with _handled(self.note, *SIGNALS):
            yield self


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *signums: int) -> Iterator[None]:
    """``handler`` for ``signums``. Outside of the main thread Python allows none: nothing is changed then.

    A signal that was ignored from the start (``nohup``, a background job of a shell) stays ignored.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.getsignal(signum) for signum in signums if is_main}
    ours = [signum for signum, was in before.items() if was not in (signal.SIG_IGN, None)]
    for signum in ours:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum in ours:
            signal.signal(signum, before[signum])
