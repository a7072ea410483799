"""Several processes: process group, main-rank output, errors raised on every rank.

``torchrun --nproc-per-node N -m mica adapt …``, on one machine or on several, and ``accelerate launch -m mica
adapt …`` start the processes; accelerate's ``PartialState`` finds its group and device.
"""

import ctypes
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from accelerate.utils import gather as gather_tensor

from mica.cli.output import one_line
from mica.errors import UsageError

# While one process reads or tokenises, the others wait: longer than the default, 10 minutes with NCCL and 30
# with gloo.
_PATIENCE = timedelta(hours=24)


def start() -> PartialState:
    """Join the group of processes, if several were started, and return accelerate's ``PartialState``.

    gloo where there is no accelerator (or ``ACCELERATE_USE_CPU`` is set), else the accelerator's own library.
    Every process but the main one is silent from here on: standard output, progress bars, warnings.
    """
    state = PartialState(cpu=use_cpu(), timeout=_PATIENCE)
    if state.device.type == "cpu":
        keep_freed_memory()
    if not state.is_main_process:
        import datasets
        import huggingface_hub
        import transformers

        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ["TQDM_DISABLE"] = "1"  # for modules that are imported later
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    return state


def keep_freed_memory() -> None:
    """Have glibc keep memory that is freed, for the next step, instead of giving it back to the system.

    Otherwise a step of SmolLM2-135M (512 tokens) pays 124,000 page faults, 8 to 11 % of its time. Peak memory
    grows by 2 %. Does nothing with another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, value in _KEEPING.items():
            ctypes.CDLL(None).mallopt(option, value)


# By malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, in bytes
_KEEPING = {-3: 2**30, -1: 2**31 - 1, -2: 2**26}


def use_cpu() -> bool:
    """Whether to train on the CPU: there is no accelerator, or ``ACCELERATE_USE_CPU`` is set."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def finish() -> None:
    """Leave the group, if there is one. Does not wait for the others, and raises nothing."""
    with suppress(RuntimeError, ValueError):  # another process has gone already
        PartialState().destroy_process_group()


def several() -> bool:
    """Whether there is more than one process."""
    return PartialState().num_processes > 1


def largest(number: int) -> int:
    """The largest ``number`` of all processes; each must call this. One small collective."""
    if not several():
        return number
    return int(gather_tensor(torch.tensor([number], device=PartialState().device)).max())


@contextmanager
def agreed(kinds: type[Exception] = Exception) -> Iterator[None]:
    """An error of ``kinds`` that one process raises within is raised by all, by others as a UsageError.

    Every process must enter it; at its end they meet. So none goes on alone, or waits for one that has given
    up. It may be entered within itself: the innermost meeting spreads an error, and those outside pass it on.
    """
    error = None
    try:
        yield
    except kinds as caught:
        if getattr(caught, "is_known", False):
            raise
        error = caught
    messages = [None if error is None else one_line(error)]
    if several():
        messages = gather_object(messages)
    if error is None:
        others = [message for message in messages if message is not None]
        if not others:
            return
        error = UsageError(others[0])
    error.is_known = True
    raise error


def on_main(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in the main process, while the others wait; all return its result.

    The result must be picklable. What it raises is `agreed`.
    """
    results = [None]
    with agreed():
        if PartialState().is_main_process:
            results = [function(*arguments)]
    if several():
        broadcast_object_list(results)
    return results[0]


class LostPeerError(UsageError):
    """Another process died while this one waited for it: no collective can succeed any more."""

    is_known = True


@contextmanager
def one_voice() -> Iterator[None]:
    """`agreed` for errors of the user: the main process raises them, the others end with SystemExit(2).

    Every process must enter it, with all that it does.
    """
    try:
        with agreed(UsageError):  # a bug of one must not wait for others, which are elsewhere
            yield
    except UsageError as error:
        if PartialState().is_main_process or isinstance(error, LostPeerError):
            raise
        raise SystemExit(2) from None


@contextmanager
def peers_needed(saved: Callable[[], str]) -> Iterator[None]:
    """Raise LostPeerError, with what is ``saved()``, for an error of gloo or NCCL that says so."""
    try:
        yield
    except RuntimeError as error:
        is_lost = any(sign in str(error) for sign in ("gloo", "remote process exited"))
        if not several() or not is_lost:
            raise
        raise LostPeerError(f"another process died; {saved()}") from error
