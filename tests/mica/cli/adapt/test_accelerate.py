"""The settings of FSDP2 on the page, as ``accelerate launch`` reads them: the run of one process."""

import os
import re
from pathlib import Path

import datasets
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from mica.cli.adapt import checkpoints
from tests.support.adapt_runs import (
    Process,
    command,
    fresh_state,  # noqa: F401 (a fixture)
    gloo_as_accelerator,
    summary,
)
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow


def options(model_dir, text_file, output) -> list[str]:
    given = {"model": model_dir, "text": text_file, "output": output, "rank": 4, "steps": 6, "log-steps": 1}
    given |= {"sequence-length": 32, "save-steps": 3, "dropout": 0.1}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def yaml_of_the_page() -> str:
    page = (ROOT / "mica" / "cli" / "README.md").read_text(encoding="utf-8")
    return re.search(r"```yaml\n(distributed_type: FSDP.*?)```", page, re.DOTALL)[1]


def by_accelerate(file: Path, cache: Path, *argv) -> None:
    """In the environment that ``accelerate launch --config_file`` makes."""
    given = launch_command_parser().parse_args(["--config_file", str(file), "-m", "mica"])
    os.environ.update(prepare_multi_gpu_env(_validate_launch_command(given)[0]))
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    with gloo_as_accelerator():
        in_one_group(cache, *argv)


def in_one_group(cache, *argv) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    raise SystemExit(command(*argv))  # the group has been left


def test_fsdp2_by_the_file_of_the_page(model_dir, text_file, tmp_path):
    shown = yaml_of_the_page()
    file = tmp_path / "fsdp2.yaml"
    file.write_text(shown.replace("processes: 16", "processes: 2").replace("machines: 2", "machines: 1"))
    argv = [*options(model_dir, text_file, tmp_path / "two"), "--dropout", "0"]
    started = Process(by_accelerate, file, tmp_path, *argv, count=2, folder=tmp_path)
    assert started.join() == [0, 0], started.errors()
    assert checkpoints.facts(tmp_path / "two" / "checkpoint-6")["engine"] == "FSDP"
    alone = [*options(model_dir, text_file, tmp_path / "one"), "--dropout", "0", "--batch-size", "4"]
    assert command(*alone) == 0
    found, expected = summary(tmp_path / "two"), summary(tmp_path / "one")
    for name in ("training_loss", "perplexity_after"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["perplexity_after"] < found["perplexity_before"]
