"""The processes of a comparison on several GPUs: each does whole trainings by itself, on a GPU of its own."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from mica.cli.compare.schedule import Planned

_comparison = None  # in a worker, once it has begun


@contextmanager
def pool(count: int, settings: dict[str, object], output: Path) -> Iterator[ProcessPoolExecutor]:
    """``count`` processes for the comparison with these ``settings``, one for each GPU this process sees.

    Where it is left by an exception, what they are at is given up.
    """
    context = multiprocessing.get_context("spawn")
    gpus = context.Queue()
    every = ",".join(map(str, range(count)))
    names = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    for name in names[:count]:
        gpus.put(name)
    workers = ProcessPoolExecutor(count, context, _begin, (gpus, settings, output))
    try:
        yield workers
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        workers.shutdown(cancel_futures=True)


def _begin(gpus, settings: dict[str, object], output: Path) -> None:
    """Set up a worker. The GPU is chosen before torch looks for any."""
    global _comparison
    os.environ |= {"CUDA_VISIBLE_DEVICES": gpus.get(), "TQDM_DISABLE": "1"}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends them

    from mica.cli.compare.trainings import Trainings

    _comparison = Trainings(settings, output)


def _make(planned: Planned, latest: float) -> dict | None:
    return _comparison.make(planned, latest)


def make(
    workers: ProcessPoolExecutor, todo: list[Planned], latest: float
) -> Iterator[tuple[Planned, dict | None]]:
    """Each of ``todo`` with its result (see `Trainings.make`), in the order in which they end."""
    futures = {workers.submit(_make, planned, latest): planned for planned in todo}
    for future in as_completed(futures):
        yield futures[future], future.result()
