"""Runs of ``mica adapt`` in short, in this process or in others: settings, texts, and what a run leaves."""

import atexit
import bz2
import gc
import gzip
import json
import lzma
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from argparse import Namespace
from collections.abc import Callable, Collection
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import accelerate.state
import pyarrow
import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from mica.cli import main
from mica.cli.adapt import adapter, config, processes, result, training
from mica.cli.adapt.training import Training
from mica.errors import UsageError
from tests.support.processes import ROOT
from tests.support.server import SERVER
from tests.support.tiny_cli import byte_tokenizer, tiny_llama

# The Trainer collects garbage at the end of a run: looking through all that is imported took half of a test.
gc.freeze()
atexit.register(gc.unfreeze)  # or libraries report at exit what leaks


_TINY = {
    "dtype": "float32",
    "held_out": 0.1,
    "sequence_length": 32,
    "rank": 4,
    "alpha": 8,
    "dropout": 0.1,
    "steps": 10,
    "epochs": None,
    "batch_size": 4,
    "learning_rate": 5e-3,
    "log_steps": 5,
    "save_steps": 5,
}


def settings(output: Path = Path("unused"), **changed: Any) -> Namespace:
    """All settings, resolved; ``changed`` win. Four blocks of 32 tokens a step, ten steps."""
    given = Namespace(model="model", text=["text.txt"], output=output, recipe="paper")
    values = vars(config.resolve(given).args) | _TINY
    unknown = changed.keys() - values.keys()
    assert not unknown, unknown
    return Namespace(**{**values, **changed})


def adapter_settings(**changes) -> Namespace:
    """Those of a run of which base, adapter and result are tested, and not the training."""
    own = {"model": "unused", "dtype": "auto", "dropout": 0.0, "target_modules": "q_proj,down_proj"}
    return settings(**own | changes)


ROWS = [
    {"title": f"Nr {n}", "text": f"{n} mal {n} ist {n * n}; schön, 漢字.\r\n" * (n % 4 + 1)}
    for n in range(30)
]


def compressed_by_zstandard(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows to a table or to JSON by the suffix of ``path``, compressed if there is a second one."""
    import pandas as pd

    kind = path.suffixes[0]
    if kind == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
        return path
    if kind == ".json":
        data = json.dumps(rows, indent=1)
    elif kind in (".csv", ".tsv"):
        data = pd.DataFrame(rows).to_csv(index=False, sep="," if kind == ".csv" else "\t")
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows)
    packs = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": compressed_by_zstandard,
    }
    path.write_bytes(packs.get(path.suffix, bytes)(data.encode()))
    return path


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
    return train(model(args, checkpoint), data or corpus(), args, checkpoint)


def train(model, data, args, checkpoint: Path | None = None) -> Training:
    return training.Session(model, data, args, checkpoint).train()


def losses(result: Training) -> list[tuple[int, float]]:
    """Step and loss of each log."""
    return [(entry["step"], entry["loss"]) for entry in result.history if "loss" in entry]


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
    return train(model(args, checkpoint), data, args, checkpoint)


def run_sharded(kind: str, args) -> Training:
    """`run` with FSDP2 by the settings on the page, as ``accelerate launch --config_file`` reads them.

    accelerate offers FSDP2 on GPUs only; here it is told that gloo on CPUs is one. ``kind``: FULL_STATE_DICT
    or SHARDED_STATE_DICT.
    """
    page = (ROOT / "mica" / "cli" / "README.md").read_text(encoding="utf-8")
    text = re.search(r"```yaml\n(distributed_type: FSDP.*?)```", page, re.DOTALL)[1]
    text = text.replace("processes: 16", "processes: 2").replace("machines: 2", "machines: 1")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        given = launch_command_parser().parse_args(["--config_file", file.name, "-m", "mica"])
        os.environ.update(prepare_multi_gpu_env(_validate_launch_command(given)[0]))
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", FSDP_STATE_DICT_TYPE=kind)
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


# -- what a run leaves ----------------------------------------------------------------------------------


def saved(model, folder: Path) -> Path:
    """``folder``, with ``model`` and the byte tokenizer."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def command(*argv: object) -> int:
    return main(["adapt", *map(str, argv)])


def resume(output: Path) -> int:
    return command("--output", output, "--resume")


def unfinished(run: Path, output: Path, last: int = 8) -> Path:
    """A copy of ``run`` as kill -9 leaves it after the checkpoint of step ``last``."""
    shutil.copytree(run, output)
    for name in ("adapter_model.safetensors", "adapter_config.json", "summary.json", "README.md"):
        (output / name).unlink()
    shutil.rmtree(output / "merged", ignore_errors=True)
    if last == 8:
        shutil.rmtree(output / "checkpoint-12")
    return output


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def log_of(output: Path) -> list[dict]:
    """What a run of 12 steps has logged and measured, up to its last checkpoint, without times."""
    state = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text(encoding="utf-8"))
    timed = ("train_runtime", "train_tokens_per_second")
    return [{name: entry[name] for name in entry if name not in timed} for entry in state["log_history"]]


def weights(folder: Path, name: str = "adapter_model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def whole_embeddings(folder: Path) -> dict[str, torch.Tensor]:
    """The trained embeddings in an adapter's file, by the names of their modules."""
    found = {key.removeprefix("base_model.model."): weight for key, weight in weights(folder).items()}
    return {key.removesuffix(".weight"): weight for key, weight in found.items() if "lora_" not in key}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def move(model) -> None:
    """As if trained: A is no longer zero."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.data.normal_(std=0.2)


def factors(model, factor: str) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters() if f"lora_{factor}" in name}


def write_adapter(folder: Path, model=None, **changes):
    """A saved MiCA adapter that has learned; returns the model with it. Default: on the tiny Llama."""
    wrapped = adapter.start(model or tiny_llama(), adapter_settings(**changes))
    move(wrapped)
    result.save(wrapped, byte_tokenizer(), folder)
    return wrapped


@contextmanager
def working_in(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def poison_solver(monkeypatch) -> None:
    """Any solver that runs fails the test: this package's, and the SVD that PEFT calls."""

    def solve(tasks, *_, **__):
        assert not tasks, "the solver ran"
        return iter(())

    monkeypatch.setattr("mica.fast.create.solving.run_shared", solve)
    monkeypatch.setattr("torch.linalg.svd", lambda *_, **__: pytest.fail("PEFT's solver ran"))
