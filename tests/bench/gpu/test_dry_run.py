"""`make gpu` rehearsed without a GPU: every stage runs, and a fault in one leaves the others' results."""

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from itertools import chain
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu.stages import DRY_TESTS, STAGES, job
from bench.results.names import BARE, COPY, EIGH, STOCK, STOCK_16, SVD, of_form
from bench.results.schema import Result
from tests.support.processes import ROOT, outside, start


def test_what_it_needs_is_named(capsys, monkeypatch):
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
        assert "torch sees none here" in capsys.readouterr().err
    for version, is_refused in {"0.19.3": True, "0.20.0": False, "1.0.0.dev0": False}.items():
        monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name, version=version: version)
        why = gpu.what_is_missing() or ""
        assert ("PEFT 0.20 or later, which has MiCA, but here is 0.19.3" in why) == is_refused, version
    monkeypatch.setattr(gpu, "REQUIRED", ("torch", "no_such_package"))
    assert gpu.main(["--dry-run"]) == 2
    assert "needs no_such_package" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stages(stage, tmp_path):
    """Kernels are required where they are timed: on "auto" PyTorch would be timed under our name."""
    folder = ROOT / "tests" if stage.tests else ROOT / "bench" / "suites"
    assert all((folder / file).exists() for file in (*stage.files, *(DRY_TESTS if stage.parallel else ())))
    process = job(stage, tmp_path / "run.json", False, 1e9, 60.0)
    timed = not stage.tests and stage.name != "initialisation"  # there are no kernels in a solver
    assert (process.environment["MICA_BACKEND"] == "triton") == timed
    assert process.environment["TRITON_INTERPRET"] == "0"  # whatever the environment says
    if stage.tests:  # to the end
        assert not {"-x", "-q"} & {*process.command}
        assert process.environment["MICA_TEST_DEVICE"] == "cuda"


def test_two_commands_run_all_stages_within_the_budget():
    text = " ".join(gpu.parser().format_help().split())
    commands = re.search(r"([\d,]+) and ([\d,]+) each end within the default budget", text).groups()
    parts = [[int(number) for number in stages.split(",")] for stages in commands]
    assert sorted(chain(*parts)) == [*range(1, len(STAGES) + 1)]
    for part in parts:
        assert sum(STAGES[number - 1].seconds for number in part) <= gpu.BUDGET


def test_a_machine_without_pandas_is_told_how_to_make_the_report(monkeypatch):
    def write(file):
        raise ImportError("x", name="pandas")

    monkeypatch.setattr("bench.report.__main__.write", write)
    text = gpu.report(Path("run.json"))
    assert text == "pandas is not installed here: python -m bench.report run.json makes the report"


SILENCE = 25  # seconds, after which a process that has begun is taken to hang
FAULTS = ("raise", "wrong", "memory", "kill", "hang")
# In five runs every stage meets every fault: the tests make one, MICA_TEST_ROTATION=1 to 4 the others.
ROTATION = int(os.environ.get("MICA_TEST_ROTATION", "0"))
FAULT_OF = {stage.name: FAULTS[(number + ROTATION) % len(FAULTS)] for number, stage in enumerate(STAGES)}
BASELINES = {BARE, STOCK, STOCK_16, COPY, SVD, EIGH}
OURS = {of_form("split"), "minor_subspace, auto, r = 16"}
SUITES = {  # of a stage in which something is timed
    "bandwidth": ("kernels",),
    "layers": ("layer",),
    "model": ("step", "block"),
    "initialisation": ("subspace",),
    "forms": ("forms",),
}


def timed(result, stage):
    """Names of the implementations that have a number in a stage."""
    groups = [group for suite in SUITES.get(stage, ()) for group in result.select(suite=suite)]
    return {name for group in groups for name in group.timings}


@pytest.mark.slow
def test_a_run_that_is_cut_off_reports_what_it_has(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--name", "run", "--stages", "3,8"]
    settings = outside() | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True)
    entries = tmp_path / "run.jsonl"
    while not (entries.exists() and '"sample"' in entries.read_text()):
        assert process.poll() is None, "it ended before anything was measured"
        time.sleep(0.1)
    process.terminate()
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "The run was cut off." in printed
    result = Result.load(tmp_path / "run.json")
    assert [one["state"] for one in result.stages] == ["cut off"]
    assert timed(result, "bandwidth")
    assert "**cut off**" in (tmp_path / "run.md").read_text()


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory):
    """One run with a fault in every stage: its result, and what was printed."""
    folder = tmp_path_factory.mktemp("faults")
    settings = {"OUT": str(folder), "OMP_NUM_THREADS": "1", "plugin": "tests.support.broken_stage"}
    settings["MICA_TEST_FAULTS"] = ",".join(f"{stage}:{fault}" for stage, fault in FAULT_OF.items())
    options = ["--dry-run", "--name", "run", "--silence", SILENCE, "--budget", 3000]
    done = start("bench.gpu", *options, **settings)
    assert done.returncode == 1, done.stdout + done.stderr
    return Result.load(folder / "run.json"), done.stdout


@pytest.mark.slow
def test_every_stage_is_reported_and_has_results_of_complete_rounds(with_faults):
    result, output = with_faults
    printed = [line.removeprefix("STAGE ") for line in output.splitlines() if line.startswith("STAGE ")]
    assert result.stages == [json.loads(line) for line in printed]
    assert [one["stage"] for one in result.stages] == [stage.name for stage in STAGES]
    for one in result.stages:  # where every launch raises or is wrong, no test of kernels passes
        assert one["passed"] or (FAULT_OF[one["stage"]] in ("raise", "wrong") and one["failed"]), one
        assert one["state"] in ("passed", "failed"), one
    assert all(timed(result, stage) & BASELINES for stage in SUITES)
    for group in result.groups:
        assert len({len(timing.seconds) for timing in group.timings.values()}) == 1, group.name
    assert result.machine["device"] == "dry run"
    assert "Its times are not measurements" in output


@pytest.mark.slow
def test_a_model_has_predicted_rows_by_their_names_before_anything_ran(with_faults):
    result, output = with_faults
    groups = {group.name: group for group in result.groups}
    refused = {one["group"] for one in result.refused if "implementation" not in one}
    assert {one["group"] for one in result.predictions} <= groups.keys() | refused
    predicted = [groups[one["group"]] for one in result.predictions if one["group"] in groups]
    assert {group.axes["suite"] for group in predicted} == {"kernels", "layer", "forms"}
    assert "## Prediction and measurement" in output
    assert "no prediction" not in output


@pytest.mark.slow
def test_what_is_wrong_has_no_number_and_what_stops_a_process_is_named(with_faults):
    result, _ = with_faults
    states = {one["stage"]: one["state"] for one in result.stages}
    stages_with = defaultdict(set)
    for stage, fault in FAULT_OF.items():
        stages_with[fault].add(stage)
    # the stage streams compares a layer with itself, which is always as wrong
    for stage in stages_with["raise"] | stages_with["wrong"] - {"streams"}:
        assert states[stage] == "failed"
        assert not timed(result, stage) & OURS, stage
    whys = [one.get("why", "") for one in (*result.refused, *result.checks)]
    for fault, why in {"raise": "injected", "memory": "out of memory, injected"}.items():
        assert any(why in one for one in whys) or not stages_with[fault]
    assert whys.count("the process died") == len(stages_with["kill"] - {"tests"})
    assert whys.count(f"nothing was heard for {SILENCE} s") == len(stages_with["hang"])
    stopped = stages_with["memory"] | stages_with["kill"] | stages_with["hang"]
    for stage in {"layers", "forms"} & stopped:  # in the other cells
        assert of_form("split") in timed(result, stage)
