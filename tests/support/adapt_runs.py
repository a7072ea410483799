"""A run of ``mica adapt`` in short: a tiny Llama and random blocks, in this process or in others."""

import atexit
import gc
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import accelerate.state
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from mica.cli.adapt import adapter, processes, training
from mica.cli.adapt.training import Training
from mica.errors import UsageError
from tests.support.server import SERVER
from tests.support.tiny_cli import tiny_llama

# The Trainer collects garbage at the end of a run: looking through all that is imported took half of a test.
gc.freeze()
atexit.register(gc.unfreeze)  # or libraries report at exit what leaks


def blocks(count: int, seed: int, documents: bool = True, length: int = 32) -> list[dict[str, torch.Tensor]]:
    """Random tokens with a regularity to learn. ``documents``: two a block, starts are not predicted."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 64, (length,), generator=generator)
        ids[1::2] = ids[::2] + 64  # every second token follows from the one before
        item = {"input_ids": ids, "labels": ids.clone()}
        if documents:
            cut = int(torch.randint(1, length, (1,), generator=generator))
            item["labels"][[0, cut]] = -100
            item["position_ids"] = torch.cat((torch.arange(cut), torch.arange(length - cut)))
        made.append(item)
    return made


def corpus(count: int = 64, held_out: int = 5, retain: int = 0, **options) -> SimpleNamespace:
    """As ``corpus.gather`` gives it."""
    train = blocks(count, 1, **options)
    return SimpleNamespace(
        train=train,
        fingerprint=f"{count} {options}",
        retain_fingerprint=f"{retain} {options}" if retain else None,
        held_out=blocks(held_out, 2, **options),
        retain=blocks(retain, 3, **options) or None,
    )


def model(args, checkpoint: Path | None = None):
    """The PeftModel, new or from ``checkpoint``."""
    return adapter.start(tiny_llama().to(getattr(torch, args.dtype)), args, checkpoint)


def run(args, data=None) -> Training:
    """What ``mica adapt`` does between its options and its summary."""
    processes.start()
    checkpoint = training.find_checkpoint(args)
    return training.train(model(args, checkpoint), data or corpus(), args, checkpoint)


def losses(result: Training) -> list[tuple[int, float]]:
    """Step and loss of each log."""
    return [(entry["step"], entry["loss"]) for entry in result.history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the adapter that was written to ``folder``."""
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class _Watched(list):
    """Blocks that call ``act()`` when they have been read as often as one of ``reads`` says."""

    def __init__(self, blocks, reads: Collection[int], act: Callable[[], None]):
        super().__init__(blocks)
        self.reads, self.act, self.count = reads, act, 0

    def __getitem__(self, index):
        self.count += 1
        if self.count in self.reads:
            self.act()
        return super().__getitem__(index)


def run_signalled(args, signum: int, steps: list[int | None], delay: float = 0.0) -> Training:
    """`run`, where process i gets a signal ``delay`` s after it has read the blocks of step ``steps[i]``.

    And again after the next block, as torchrun repeats it. None: it gets none.
    """
    state = processes.start()
    checkpoint = training.find_checkpoint(args)
    data, step = corpus(), steps[state.process_index]
    if step is not None:
        read = (step - (training.checkpoints.step(checkpoint) if checkpoint else 0)) * args.batch_size

        def send():
            threading.Timer(delay, os.kill, (os.getpid(), signum)).start()

        data.train = _Watched(data.train, (read, read + 1), send)
    return training.train(model(args, checkpoint), data, args, checkpoint)


def run_sharded(kind: str, args) -> Training:
    """`run` with FSDP2 as accelerate's configuration file sets it up; accelerate offers it on GPUs only.

    Here it is told that gloo on CPUs is one. ``kind``: FULL_STATE_DICT or SHARDED_STATE_DICT.
    """
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        ACCELERATE_TORCH_DEVICE="cpu",
        FSDP_VERSION="2",
        FSDP_STATE_DICT_TYPE=kind,
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer",
        FSDP_RESHARD_AFTER_FORWARD="true",
    )
    with gloo_as_accelerator():
        return run(args)


@contextmanager
def gloo_as_accelerator():
    """What accelerate offers on GPUs only, on CPUs."""
    backend = ("gloo", DistributedType.MULTI_GPU)
    with (
        patch("accelerate.state.PartialState._prepare_backend", lambda *args, **kwargs: backend),
        patch("mica.cli.adapt.processes.use_cpu", lambda: False),
    ):
        yield


class Process:
    """One or several processes that call ``function(*arguments)``; each must be a module's function."""

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, count: int = 1, folder: Path | None = None
    ):
        self.folder = folder
        self._store = dist.TCPStore(
            "localhost", 0, is_master=True, wait_for_workers=False
        )  # as torchrun has one
        port = self._store.port
        self.processes = [
            SERVER.Process(target=_enter, args=(function, arguments, rank, count, port, folder))
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def kill(self, signum: int = signal.SIGKILL, rank: int | None = None) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signum)

    def wait_for_one(self) -> None:
        """Until one of the processes has ended."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes])

    def join(self, timeout: float = 120) -> list[int]:
        """The exit statuses; processes that do not end are killed."""
        for process in self.processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def results(self) -> list[Any]:
        """What each process returned."""
        return [
            torch.load(self.folder / f"result-{i}", weights_only=False) for i in range(len(self.processes))
        ]

    def errors(self) -> str:
        """What all processes wrote to standard error."""
        return "".join((self.folder / f"stderr-{i}").read_text() for i in range(len(self.processes)))


def _enter(function, arguments, rank, count, port, folder):
    torch.set_num_threads(1)
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    if folder is not None:
        sys.stderr = open(folder / f"stderr-{rank}", "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        os.dup2(sys.stderr.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing's children ignore it
    status = 0
    try:
        with processes.one_voice():
            result = function(*arguments)
        if folder is not None:
            torch.save(result, folder / f"result-{rank}")
    except KeyboardInterrupt:
        status = 130
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except SystemExit as stop:
        status = stop.code
    processes.finish()
    os._exit(status)  # threads of a lost group must not keep it


@pytest.fixture(autouse=True)
def fresh_state():
    """Forgets what accelerate keeps of a run in this process; for the files that import it."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
