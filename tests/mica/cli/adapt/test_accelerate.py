"""The settings of FSDP2 on the page, as ``accelerate launch`` reads them: the run of one process."""

import os
import re
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from mica.cli.adapt import checkpoints
from tests.support.adapt_runs import (
    Process,
    fresh_state,  # noqa: F401 (a fixture)
    gloo_as_accelerator,
    losses,
    run,
    settings,
)
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow


def yaml_of_the_page() -> str:
    page = (ROOT / "mica" / "cli" / "README.md").read_text(encoding="utf-8")
    return re.search(r"```yaml\n(distributed_type: FSDP.*?)```", page, re.DOTALL)[1]


def by_accelerate(file: Path, args):
    """`run` in the environment that ``accelerate launch --config_file`` makes."""
    given = launch_command_parser().parse_args(["--config_file", str(file), "-m", "mica"])
    os.environ.update(prepare_multi_gpu_env(_validate_launch_command(given)[0]))
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    with gloo_as_accelerator():
        return run(args)


def test_fsdp2_by_the_file_of_the_page(tmp_path):
    file = tmp_path / "fsdp2.yaml"
    text = yaml_of_the_page().replace("processes: 16", "processes: 2").replace("machines: 2", "machines: 1")
    file.write_text(text)
    args = settings(tmp_path / "two", batch_size=2, dropout=0.0)
    started = Process(by_accelerate, file, args, count=2, folder=tmp_path)
    assert started.join() == [0, 0], started.errors()
    assert checkpoints.facts(tmp_path / "two" / "checkpoint-10")["engine"] == "FSDP"
    alone = run(settings(tmp_path / "one", dropout=0.0))
    assert dict(losses(started.results()[0])) == pytest.approx(dict(losses(alone)), rel=1e-5)
