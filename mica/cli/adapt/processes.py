"""Several processes: one group, one voice, and errors that all of them know.

``torchrun --nproc-per-node N -m mica adapt …`` and ``accelerate launch -m mica adapt …`` start the
processes; accelerate's ``PartialState`` finds its group and device.
"""

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
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
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
    state = PartialState(cpu=use_cpu(), timeout=_PATIENCE)
    if not state.is_main_process:
        _silence()
    return state


def use_cpu() -> bool:
    """Whether to train on the CPU: there is no accelerator, or ``ACCELERATE_USE_CPU`` is set."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _silence() -> None:
    """Print nothing but errors: what this process has to say, the main one says."""
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
    messages = [error and one_line(error)]
    if several():
        messages = gather_object(messages)
    if error is not None:
        raise error
    for message in messages:
        if message is not None:
            raise UsageError(message)


def on_main(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in the main process, while the others wait; all return its result.

    The result must be picklable. Raises in every process what is raised in the main one: there the error
    itself, elsewhere a UsageError with its message.
    """
    results, error = [None], None
    if PartialState().is_main_process:
        try:
            results = [function(*arguments)]
        except Exception as caught:  # whatever it is: the others must not wait for this process
            error = caught
    agree(error)
    if several():
        broadcast_object_list(results)
    return results[0]


def alike(value: Any, what: str) -> Any:
    """``value`` (hashable). Every process must call this; all raise UsageError if theirs are not the same."""
    if several() and len(set(gather_object([value]))) > 1:
        raise UsageError(f"{what}: not the same for all processes")
    return value


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether ``error`` says that another process has ended while this one waited for it (gloo, NCCL)."""
    return several() and any(sign in str(error) for sign in ("gloo", "remote process exited"))


@contextmanager
def errors_once() -> Iterator[None]:
    """Let one process report an error that several of them raise: the others end with SystemExit(2)."""
    try:
        yield
    except UsageError as error:
        # The main one would not do: what only another knows would be said by none. Without the store (its
        # name is not public; it goes with the process that has it) rather twice than never.
        with suppress(RuntimeError, AttributeError):
            if several() and dist.is_initialized():
                store = dist.distributed_c10d._get_default_store()
                if store.add(f"mica/error/{one_line(error)}", 1) > 1:
                    raise SystemExit(2) from None
        raise
