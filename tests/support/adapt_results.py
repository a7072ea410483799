"""What a run of ``mica adapt`` leaves, and settings and adapters without a training, for its tests."""

import contextlib
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mica.cli import main
from mica.cli.adapt import adapter, result
from tests.support import adapt_settings
from tests.support.tiny_cli import byte_tokenizer, tiny_llama


def settings(**changes) -> Namespace:
    """The settings of a run of which base, adapter and result are tested."""
    own = {"model": "unused", "dtype": "auto", "dropout": 0.0, "target_modules": "q_proj,down_proj"}
    return adapt_settings.settings(**own | changes)


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
    if last == 8:
        shutil.rmtree(output / "checkpoint-12")
    return output


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def weights(folder: Path, name: str = "adapter_model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


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
    wrapped = adapter.start(model or tiny_llama(), settings(**changes))
    move(wrapped)
    result.save(wrapped, byte_tokenizer(), folder)
    return wrapped


@contextlib.contextmanager
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

    monkeypatch.setattr("mica.fast.create.solving.solve_shared", solve)
    monkeypatch.setattr("torch.linalg.svd", lambda *_, **__: pytest.fail("PEFT's solver ran"))
