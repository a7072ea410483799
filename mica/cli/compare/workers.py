"""The processes of a comparison: each does whole trainings by itself, on a device of its own.

They are those of ``torchrun --nproc-per-node N -m mica compare ...`` or ``accelerate launch``, else the
command starts them itself. They share nothing but the output folder.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from mica.cli import lock
from mica.cli.output import explained

_OPEN = "open.lock"  # held by the main process while others may work; its `Session` is in it
# Number of a process that `others` starts, and of its parent, which may die before the process can look
_NUMBER = "MICA_COMPARE_WORKER"
_OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """This process's ``number`` among the ``total`` that a launcher has started; the main one is 0.

    ``parent``: the process that has started it.
    """

    number: int
    total: int
    parent: int


def place() -> Place:
    """Leave the group that a launcher wants this process to join, with one GPU of its own.

    To be called before torch is imported: it would see all GPUs.
    """
    own = os.environ.pop(_NUMBER, None)
    if own is not None:
        number, parent = json.loads(own)
        return Place(number, 1, parent)
    number = int(os.environ.get("RANK", 0))
    found = Place(number, int(os.environ.get("WORLD_SIZE", 1)), os.getppid())
    if found.total > 1:
        local = int(os.environ.get("LOCAL_RANK", found.number))
        os.environ["CUDA_VISIBLE_DEVICES"] = _device(local)
    for name in _OF_A_GROUP:
        os.environ.pop(name, None)
    return found


def _device(number: int) -> str:
    """The name of one of the GPUs that this process may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(number)
    names = visible.split(",")
    return names[number % len(names)]


def suitable(base) -> int:
    """How many trainings of models like ``base`` run side by side on this machine.

    One per GPU. On a CPU one per core, at most 4, if there is memory for full fine-tuning: its weights,
    gradients and Adam's two moments in float32 beside the base, and as much again for activations.
    """
    import psutil
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.device_count()
    weights = sum(4 * parameter.numel() for parameter in base.parameters())
    fitting = psutil.virtual_memory().available // (10 * weights)
    return max(1, min(4, torch.get_num_threads(), int(fitting)))


class Session(NamedTuple):
    """One start of a comparison: when its clock was at 0 (Unix time), and how many trainings run at once."""

    zero: float
    jobs: int

    def clock(self) -> float:
        """Seconds that all starts of the comparison have taken."""
        return time.time() - self.zero


@contextmanager
def opened(folder: Path, elapsed: float, jobs: int) -> Iterator[Session]:
    """Let other processes work on ``folder``. ``elapsed``: by the clock when the comparison was left."""
    path = folder / _OPEN
    with ExitStack() as stack:
        while True:
            try:
                with explained(f"--output {path}: cannot be written", OSError):
                    stack.enter_context(lock.held(path))
                break
            except lock.HeldError:  # for a moment, by one that looks whether it is held
                time.sleep(0.01)
        session = Session(time.time() - elapsed, jobs)
        with explained(f"--output {path}: cannot be written", OSError):
            path.write_text(json.dumps(session), encoding="utf-8")
        yield session


def wait_until_open(folder: Path, watch: Callable[[], None]) -> Session:
    """Wait for the main process, and return its session. ``watch`` is called meanwhile."""
    while True:
        watch()
        if folder.is_dir():
            try:
                with lock.held(folder / _OPEN):
                    pass
            except lock.HeldError:
                text = (folder / _OPEN).read_text(encoding="utf-8")
                if text:
                    return Session(*json.loads(text))
        time.sleep(0.1)


def watch_of(parent: int) -> Callable[[], None]:
    """A function that ends this process once its ``parent`` has died: nobody would read what it makes."""

    def watch() -> None:
        if os.getppid() != parent:
            os._exit(1)

    return watch


@contextmanager
def others(number: int, output: Path, threads: int) -> Iterator[None]:
    """``number`` more processes for the comparison in ``output``, of so many CPU threads each."""
    import torch

    command = [sys.executable, "-m", "mica", "compare", "--resume", f"--output={output}"]
    started = []
    for one in range(1, number + 1):
        environment = os.environ | {
            _NUMBER: json.dumps([one, os.getpid()]),
            "OMP_NUM_THREADS": str(threads),
            "TQDM_DISABLE": "1",
        }
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = _device(one % torch.cuda.device_count())
        # A session of its own: Ctrl-C is for the main process, which then ends them.
        started.append(subprocess.Popen(command, env=environment, start_new_session=True))
    try:
        yield
    finally:
        for process in started:
            process.kill()  # what it has not finished, nobody misses
        for process in started:
            process.wait()
