"""Several processes: one group, one voice, and errors that all of them know.

``torchrun --nproc-per-node N -m mica adapt …`` and ``accelerate launch -m mica adapt …`` start the
processes; accelerate's ``PartialState`` finds its group and device.
"""

import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils import gather as gather_tensor

from mica.cli.output import one_line
from mica.errors import UsageError

# While one process reads or tokenises, the others wait. The default is 10 minutes with NCCL, 30 with gloo.
_PATIENCE = timedelta(hours=24)


def start() -> PartialState:
    """Join the group of processes, if several were started, and return accelerate's ``PartialState``.

    gloo where there is no accelerator (or ``ACCELERATE_USE_CPU`` is set), else the accelerator's own library.
    Every process but the main one is silent from here on: standard output, progress bars, warnings.
    """
    on_cpu = use_cpu()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    if not state.is_main_process:
        _silence()
    return state


def use_cpu() -> bool:
    """Whether to train on the CPU: there is no accelerator, or ``ACCELERATE_USE_CPU`` is set."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "t", "y")
    return asked or not torch.accelerator.is_available()


def _silence() -> None:
    """Print nothing but errors: what this process has to say, the main one says."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"  # for tqdm ≥ 4.66 in modules that are imported later
    for name in ("datasets", "transformers.utils.logging", "huggingface_hub.utils"):
        module = sys.modules.get(name)
        disable = getattr(module, "disable_progress_bars", None) or getattr(
            module, "disable_progress_bar", None
        )
        if disable is not None:
            disable()


def finish() -> None:
    """Leave the group, if there is one. Does not wait for the others, and raises nothing."""
    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError, ValueError):  # another process has gone already
            dist.destroy_process_group()


def several() -> bool:
    """Whether there is more than one process."""
    return PartialState().num_processes > 1


def wait() -> None:
    """Wait until all processes are here."""
    PartialState().wait_for_everyone()


def largest(number: int) -> int:
    """The largest ``number`` of all processes; each must call this. One small collective."""
    if not several():
        return number
    return int(gather_tensor(torch.tensor([number], device=PartialState().device)).max())


def agree(error: Exception | None) -> None:
    """Raise ``error`` if there is one, and a UsageError where only another process has one.

    Every process must call this, with None where all went well. So no process goes on alone, or waits
    for one that has given up.
    """
    messages = [None if error is None else one_line(error)]
    if several():
        messages = gather_object(messages)
    if error is not None:
        raise error
    failed = [message for message in messages if message is not None]
    if failed:
        raise UsageError(failed[0])


def on_main(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in the main process, while the others wait; all return its result.

    The result must be picklable. Raises in every process what is raised in the main one: there the error
    itself, elsewhere a UsageError with its message.
    """
    if not several():
        return function(*arguments)
    result, error = None, None
    if PartialState().is_main_process:
        try:
            result = function(*arguments)
        except Exception as caught:  # whatever it is: the others must not wait for this process
            error = caught
    agree(error)
    results = [result]
    broadcast_object_list(results)
    return results[0]


def alike(value: Any, what: str) -> Any:
    """``value`` (hashable). Every process must call this; all raise UsageError if theirs are not the same."""
    if several() and len(set(gather_object([value]))) > 1:
        raise UsageError(f"{what}: not the same for all processes")
    return value


def is_lost_peer(error: Exception) -> bool:
    """Whether ``error`` says that another process has ended while this one waited for it (gloo, NCCL)."""
    text = str(error)
    return (
        several() and isinstance(error, RuntimeError) and ("gloo" in text or "remote process exited" in text)
    )


@contextmanager
def errors_once() -> Iterator[None]:
    """Let only one process report an error that several of them raise: the others end with SystemExit(2)."""
    try:
        yield
    except UsageError as error:
        if not _is_first(one_line(error)):
            raise SystemExit(2) from None
        raise


def _is_first(message: str) -> bool:
    """Whether no other process has claimed this message; the store of the group decides."""
    if not (dist.is_available() and dist.is_initialized() and several()):
        return True
    find_store = getattr(dist.distributed_c10d, "_get_default_store", None)  # not public
    try:
        key = hashlib.blake2b(message.encode(), digest_size=16).hexdigest()
        return find_store().add(f"mica/error/{key}", 1) == 1
    except (RuntimeError, TypeError):  # the store has gone with the process that had it, or is unknown
        return True  # rather twice than never
