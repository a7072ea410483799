"""A run of ``mica adapt`` in short: a tiny Llama and random blocks, in this process or in others.

Processes are forked from a server that has imported everything already, so a start costs 0.1 s and not 8.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import accelerate.state
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import mica.fast  # noqa: F401 (from here on PEFT's MiCA is this backend's)
from mica.cli.adapt import processes, signals, training
from mica.cli.adapt.training import Training
from mica.errors import UsageError
from tests.support.tiny_cli import tiny_llama

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.support.adapt_runs"])


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


def model(args, checkpoint: Path | None = None, **options):
    """The PeftModel, new or from ``checkpoint``; with the latter the solver must not run."""
    base = tiny_llama(**options).to(getattr(torch, args.dtype))
    if checkpoint is not None:
        with patch("mica.fast.create.solving.solve_shared", _solve_nothing):
            return PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    config = LoraConfig(
        init_lora_weights="mica",
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=args.target_modules.split(","),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def _solve_nothing(tasks, **options):
    assert not tasks, "the solver runs"
    return iter(())


def run(args, data=None, **options) -> Training:
    """What ``mica adapt`` does between its options and its summary."""
    processes.start()
    checkpoint = training.find_checkpoint(args)
    return training.train(model(args, checkpoint, **options), data or corpus(), args, checkpoint)


def losses(result: Training) -> list[tuple[int, float]]:
    """Step and loss of each log."""
    return [(entry["step"], entry["loss"]) for entry in result.history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the adapter that was written to ``folder``."""
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Watched(list):
    """Blocks that call ``act()`` when they have been read as often as one of ``reads`` says."""

    def __init__(self, blocks, reads: Collection[int], act: Callable[[], None]):
        super().__init__(blocks)
        self.reads, self.act, self.count = reads, act, 0

    def __getitem__(self, index):
        self.count += 1
        if self.count in self.reads:
            self.act()
        return super().__getitem__(index)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(args, step: int, delay: float, rank: int) -> None:
    """`run`, killed ``delay`` seconds after process ``rank`` has read the blocks of ``step``."""
    state = processes.start()
    checkpoint = training.find_checkpoint(args)
    done = training.checkpoints.step(checkpoint) if checkpoint else 0
    data = corpus()
    if state.process_index == rank:
        timer = threading.Timer(delay, _die)
        data.train = Watched(data.train, [(step - done) * args.batch_size], timer.start)
    training.train(model(args, checkpoint), data, args, checkpoint)
    raise AssertionError("it has not died")


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
    backend = ("gloo", DistributedType.MULTI_GPU)
    with (
        patch("accelerate.state.PartialState._prepare_backend", lambda *args, **kwargs: backend),
        patch("mica.cli.adapt.processes.use_cpu", lambda: False),
    ):
        return run(args)


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
        with signals.at_once(), processes.errors_once():
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
