"""Two torchrun groups that meet on the loopback, as two machines would: the run of two processes."""

import os
import socket
import subprocess
import sys

import datasets
import pytest

from tests.support.adapt_results import command, same, summary, weights
from tests.support.adapt_runs import Process
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


def in_one_group(cache, *argv) -> int:
    datasets.config.HF_DATASETS_CACHE = cache
    return command(*argv)


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
