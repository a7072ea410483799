"""Two torchrun groups that meet on the loopback, as two machines would: the run of two processes."""

import os
import re
import socket
import subprocess
import sys
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
    same,
    summary,
    weights,
)
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def test_two_groups_are_one_run(model_dir, text_file, tmp_path):
    outputs = tmp_path / "one", tmp_path / "two"
    rendezvous = {"nnodes": 2, "nproc-per-node": 1, "rdzv-backend": "c10d", "rdzv-id": "mica"}
    rendezvous["rdzv-endpoint"] = f"127.0.0.1:{free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += [f"--{name}={value}" for name, value in rendezvous.items()]
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    groups = []
    for machine in (0, 1):  # each with its own cache of tokens
        environment = os.environ | own | {"HF_DATASETS_CACHE": str(tmp_path / f"cache-{machine}")}
        argv = [*torchrun, "-m", "mica", "adapt", *options(model_dir, text_file, outputs[1])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        groups.append(subprocess.Popen(argv, env=environment, cwd=tmp_path, **pipes))
    try:
        alone = Process(
            in_one_group, tmp_path, *options(model_dir, text_file, outputs[0]), count=2, folder=tmp_path
        )
        assert alone.join() == [0, 0], alone.errors()
        said = [group.communicate(timeout=400) for group in groups]
    finally:
        for group in groups:
            group.kill()
            group.wait()
    assert [group.returncode for group in groups] == [0, 0], said
    assert sorted("held-out perplexity" in out for out, _ in said) == [False, True]  # one of them speaks
    assert same(weights(outputs[0]), weights(outputs[1]))
    curves = [(output / "curve.csv").read_text(encoding="utf-8") for output in outputs]
    assert curves[0] == curves[1]
    assert [summary(output)["processes"] for output in outputs] == [2, 2]
    assert sorted(path.name for path in (outputs[1] / "checkpoint-6").glob("rng_state_*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]


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
