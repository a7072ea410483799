"""`make gpu` rehearsed without a GPU: every stage runs, and has results."""

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu.stages import STAGES, job
from bench.results.names import BARE, COPY, EIGH, FAST, STOCK, STOCK_16, SVD, of_form
from bench.results.schema import Result
from bench.run import CUT_OFF
from tests.support.processes import start


def test_what_it_needs_is_named(capsys, monkeypatch):
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
    monkeypatch.setattr(gpu.importlib.metadata, "version", {"peft": "0.19.3"}.get)
    assert gpu.main(["--dry-run"]) == 2
    monkeypatch.setattr(gpu, "REQUIRED", ("torch", "no_such_package"))
    assert gpu.main(["--dry-run"]) == 2
    told = capsys.readouterr().err
    assert "torch sees none here" in told or torch.cuda.is_available()
    assert "needs PEFT 0.20 or later, which has MiCA, but here is 0.19.3" in told
    assert "needs no_such_package" in told


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stages(stage, tmp_path):
    """Kernels are required where they are timed: on "auto" PyTorch would be timed under our name."""
    process = job(stage, tmp_path / "run.json", False, 1e9, 60.0)
    timed = not stage.tests and stage.name != "initialisation"  # there are no kernels in a solver
    assert (process.environment["MICA_BACKEND"] == "triton") == timed
    assert process.environment["TRITON_INTERPRET"] == "0"  # whatever the environment says
    assert (process.environment.get("MICA_TEST_DEVICE") == "cuda") == stage.tests


def test_a_run_that_is_told_to_end_goes_on_to_its_report(capsys):
    """SIGTERM, as `timeout` sends it, during the first of two stages."""
    ended = SimpleNamespace(
        file=Path("run.json"), save=lambda: None, start=lambda job: signal.raise_signal(signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu.run_stages(ended, STAGES[:2], True, 10.0, 10.0) == [CUT_OFF]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "The run was cut off." in capsys.readouterr().out


BASELINES = {BARE, STOCK, STOCK_16, COPY, SVD, EIGH}
OURS = {of_form("split"), "minor_subspace, auto, r = 16", FAST}
SUITES = {  # of a stage in which something is timed
    "bandwidth": "kernels",
    "layers": "layer",
    "model": "block",
    "initialisation": "subspace",
    "forms": "forms",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five minutes, if nothing else runs
def test_every_stage_is_reported_and_has_results_of_complete_rounds(tmp_path):
    """`tests/bench/test_run.py` has what ends a run."""
    options = ["--dry-run", "--name", "run", "--budget", 3000]
    done = start("bench.gpu", *options, OUT=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    result = Result.load(tmp_path / "run.json")
    assert [one["stage"] for one in result.stages] == [stage.name for stage in STAGES]
    for one in result.stages:
        assert f"STAGE {json.dumps(one)}\n" in done.stdout
        assert one["passed"], one
        assert one["state"] == "passed", one
    assert not result.refused
    for stage, suite in SUITES.items():
        timed = {name for group in result.select(suite=suite) for name in group.timings}
        assert timed & BASELINES, stage
        assert stage == "bandwidth" or timed & OURS, stage
    for group in result.groups:
        assert len({len(timing.seconds) for timing in group.timings.values()}) == 1, group.name
    assert "Its times are not measurements" in done.stdout
    chosen = r": forward reference, \d.*; backward reference, \d"  # by the device
    assert re.search(chosen, done.stdout)
