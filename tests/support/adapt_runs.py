"""Runs of ``mica adapt`` in short, in this process or in others: settings, texts, and what a run leaves."""

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
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
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

from mica.cli.adapt import adapter, checkpoints, config, processes, result, training
from mica.cli.adapt.training import Training
from mica.errors import UsageError
from tests.support.pages import read
from tests.support.server import SERVER
from tests.support.tiny_cli import byte_tokenizer, mica, tiny_llama

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
    return Namespace(**values | changed)


def adapter_settings(**changes) -> Namespace:
    """Those of a run of which base, adapter and result are tested, and not the training."""
    own = {"model": "unused", "dtype": "auto", "dropout": 0.0, "target_modules": "q_proj,down_proj"}
    return settings(**own | changes)


ROWS = [
    {"title": f"Nr {n}", "text": f"{n} mal {n} ist {n * n}; schön, 漢字.\r\n" * (n % 4 + 1)}
    for n in range(30)
]


PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
}


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
    path.write_bytes(PACK.get(path.suffix, bytes)(data.encode()))
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


def corpus(count: int = 64, retain: int = 0) -> SimpleNamespace:
    """As ``corpus.gather`` gives it."""
    return SimpleNamespace(
        train=blocks(count, 1),
        fingerprint=f"some {count}",
        retain_fingerprint=f"some {retain}" if retain else None,
        held_out=blocks(5, 2),
        retain=blocks(retain, 3) or None,
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


class _Signalling(list):
    """Blocks whose reader gets a signal with the ``last`` one, and with the next, as torchrun repeats it."""

    def __init__(self, blocks, last: int, signum: int):
        super().__init__(blocks)
        self.last, self.signum, self.count = last, signum, 0

    def __getitem__(self, index):
        self.count += 1
        if self.count in (self.last, self.last + 1):
            os.kill(os.getpid(), self.signum)
        return super().__getitem__(index)


def run_signalled(args, signum: int, rank: int, step: int) -> Training:
    """`run`, where one of the processes gets a signal when it has read the blocks of a step."""
    data = corpus()
    if processes.start().process_index == rank:
        data.train = _Signalling(data.train, step * args.batch_size, signum)
    return run(args, data)


def run_sharded(kind: str, args) -> Training:
    """`run` with FSDP2 by the settings on the page, as ``accelerate launch --config_file`` reads them.

    accelerate offers FSDP2 on GPUs only; here it is told that gloo on CPUs is one. ``kind``: FULL_STATE_DICT
    or SHARDED_STATE_DICT.
    """
    page = read("mica/cli/README.md")
    text = re.search(r"```yaml\n(distributed_type: FSDP.*?)```", page, re.DOTALL)[1]
    text = text.replace("processes: 16", "processes: 2").replace("machines: 2", "machines: 1")
    file = args.output.with_suffix(f".{os.environ['RANK']}.yaml")
    file.write_text(text)
    given = launch_command_parser().parse_args(["--config_file", str(file), "-m", "mica"])
    os.environ.update(prepare_multi_gpu_env(_validate_launch_command(given)[0]))
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", FSDP_STATE_DICT_TYPE=kind)
    backend = ("gloo", DistributedType.MULTI_GPU)
    with (
        patch("accelerate.state.PartialState._prepare_backend", lambda *args, **kwargs: backend),
        patch("mica.cli.adapt.processes.use_cpu", lambda: False),
    ):
        return run(args)


def in_two_processes(
    function: Callable[..., Any], *arguments: Any, folder: Path, statuses=(0, 0)
) -> SimpleNamespace:
    """``function(*arguments)`` in two processes, as torchrun starts them; it must be a module's function.

    They end with ``statuses``. Returns their ``results``, and the ``errors``: all that they have written to
    standard error. What they need for that is in ``folder``.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    started = [
        SERVER.Process(target=_enter, args=(function, arguments, rank, store.port, folder))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()  # if it has not ended
        process.join()
    errors = "".join((folder / f"stderr-{rank}").read_text() for rank in range(2))
    assert [process.exitcode for process in started] == [*statuses], errors
    results = [torch.load(path, weights_only=False) for path in sorted(folder.glob("result-*"))]
    return SimpleNamespace(results=results, errors=errors)


def _enter(function, arguments, rank, port, folder):
    gc.freeze()  # or the Trainer's collection looks through all that is imported: half of a test
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="localhost", OMP_NUM_THREADS="1")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    sys.stderr = open(folder / f"stderr-{rank}", "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing's children ignore it
    status = 0
    try:
        with processes.one_voice():
            result = function(*arguments)
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


def transfer(adapter: Path, to: Path, output: Path, *options: object) -> int:
    return mica("transfer --adapter", adapter, "--to", to, "--output", output, *options)


def resume(output: Path) -> int:
    return mica("adapt --resume --output", output)


def edit_json(path: Path, **changes: Any) -> None:
    """Give the object in a file other values, too."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unfinished(run: Path, output: Path, last: int = 8) -> Path:
    """A copy of ``run`` as kill -9 leaves it after the checkpoint of step ``last``."""
    shutil.copytree(run, output)
    for name in ("adapter_model.safetensors", "adapter_config.json", "summary.json", "README.md"):
        (output / name).unlink()
    if last == 8:
        shutil.rmtree(output / "checkpoint-12")
    return output


def steps(output: Path) -> list[int]:
    """Those of its checkpoints."""
    return [checkpoints.step(path) for path in checkpoints.folders(output)]


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


def log_of(output: Path) -> list[dict]:
    """What a run of 12 steps has logged and measured, up to its last checkpoint, without times."""
    state = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())
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


def same_weights(one: Path, other: Path) -> bool:
    """Whether the adapters in two folders are the same to the bit."""
    return same(weights(one), weights(other))


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


def sibling(model, seed: int = 5):
    """``model`` with weights that are a little different, as if trained on."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return model


def poison_solver(monkeypatch) -> None:
    """Any solver that runs fails the test: this package's, and the SVD that PEFT calls."""

    def solve(tasks, *_, **__):
        assert not tasks, "the solver ran"
        return iter(())

    monkeypatch.setattr("mica.fast.create.solving.run_shared", solve)
    monkeypatch.setattr("torch.linalg.svd", lambda *_, **__: pytest.fail("PEFT's solver ran"))
