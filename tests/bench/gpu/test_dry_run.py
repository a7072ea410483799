"""`make gpu` rehearsed without a GPU: every stage runs, and a fault in one leaves the others' results."""

import json
import os

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu.stages import STAGES, job
from bench.results.names import BARE, COPY, FAST, STOCK, STOCK_16, SVD
from bench.results.schema import Result
from tests.support.processes import ROOT, start


def rehearse(folder, *options, faults=""):
    """(exit status, result, stage -> summary line that was printed, everything printed)."""
    settings = {"OUT": str(folder), "OMP_NUM_THREADS": "1"}
    if faults:
        settings |= {"MICA_TEST_FAULTS": faults, "plugin": "tests.support.broken_stage"}
    done = start("bench.gpu", "--dry-run", "--name", "run", *options, **settings)
    lines = [line.removeprefix("STAGE ") for line in done.stdout.splitlines() if line.startswith("STAGE ")]
    stages = {one["stage"]: one for one in map(json.loads, lines)}
    return done.returncode, Result.load(folder / "run.json"), stages, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "torch sees none here" in capsys.readouterr().err


def test_what_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "REQUIRED", ("torch", "no_such_package"))
    assert gpu.main(["--dry-run"]) == 2
    assert "needs no_such_package" in capsys.readouterr().err


def test_what_a_stage_runs_exists():
    for stage in STAGES:
        folder = ROOT / "tests" if stage.tests else ROOT / "bench" / "suites"
        assert all((folder / file).exists() for file in stage.files), stage.name


def test_kernels_are_required_where_they_are_timed(tmp_path):
    """On "auto", a kernel that fails would be replaced by PyTorch, and timed under our name."""
    for stage in STAGES:
        process = job(stage, tmp_path, "run", False, 1e9, 60.0)
        timed = not stage.tests and stage.name != "initialisation"  # there are no kernels in a solver
        assert (process.environment["MICA_BACKEND"] == "triton") == timed, stage.name
        assert process.seconds <= stage.seconds


def test_device_tests_run_to_the_end_on_all_cores(tmp_path):
    (stage,) = (one for one in STAGES if one.tests)
    process = job(stage, tmp_path, "run", False, 1e9, 60.0)
    assert "-x" not in process.command
    assert "-q" not in process.command
    assert process.command[process.command.index("--dist") + 1] == "worksteal"
    assert process.environment["MICA_TEST_DEVICE"] == "cuda"
    assert process.environment["TRITON_INTERPRET"] == "0"  # whatever the environment says


SILENCE = 60  # seconds, after which a process is taken to hang; 40 were too few on a busy machine
FAULTS = ("wrong", "raise", "kill", "hang")
# In four runs every stage meets every fault: the tests make one, MICA_TEST_ROTATION=1 to 3 the others.
ROTATION = int(os.environ.get("MICA_TEST_ROTATION", "0"))
FAULT_OF = {stage.name: FAULTS[(number + ROTATION) % len(FAULTS)] for number, stage in enumerate(STAGES)}
BASELINES = (BARE, STOCK, STOCK_16, COPY, SVD)


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory):
    """One run with a fault in every stage."""
    faults = ",".join(f"{stage}:{fault}" for stage, fault in FAULT_OF.items())
    return rehearse(tmp_path_factory.mktemp("faults"), "--silence", str(SILENCE), faults=faults)


def stages_with(*faults):
    return [stage for stage, fault in FAULT_OF.items() if fault in faults]


def timed(result, stage):
    """Names of the implementations that have a number in a stage."""
    suites = {
        "bandwidth": ("kernels",),
        "layers": ("layer",),
        "model": ("step", "block"),
        "initialisation": ("subspace", "subspaces"),
        "forms": ("forms",),
    }.get(stage, ())
    return {name for suite in suites for group in result.select(suite=suite) for name in group.timings}


def test_every_stage_is_reported_and_has_results(with_faults):
    code, result, stages, output = with_faults
    assert code == 1, output
    assert [*stages] == [stage.name for stage in STAGES]
    assert result.stages == [*stages.values()]
    for name, one in stages.items():  # of tests that all run kernels, none passes where these raise
        assert one["passed"] or (FAULT_OF[name] == "raise" and one["failed"]), one
    assert {one["state"] for one in stages.values()} <= {"passed", "failed"}, stages
    for stage in ("bandwidth", "layers", "model", "initialisation", "forms"):
        assert timed(result, stage) & {*BASELINES}, stage


def test_what_is_wrong_has_no_number_and_is_named(with_faults):
    _, result, stages, _ = with_faults
    for stage in stages_with("wrong", "raise"):
        if FAULT_OF[stage] == "wrong" and stage == "streams":
            continue  # it compares a layer with itself, which is always as wrong
        assert stages[stage]["state"] == "failed", stages[stage]
        assert FAST not in timed(result, stage), stage
    whys = [one["why"] for one in (*result.refused, *result.checks) if "why" in one]
    if stages_with("raise"):
        assert any("injected" in why for why in whys)


def test_what_stops_a_process_is_named_and_the_rest_goes_on(with_faults):
    _, result, _, _ = with_faults
    whys = [one.get("why", "") for one in (*result.refused, *result.checks)]
    assert whys.count("the process died") == len(stages_with("kill")) - ("tests" in stages_with("kill"))
    assert whys.count(f"nothing was heard for {SILENCE} s") == len(stages_with("hang"))
    if "layers" in stages_with("kill", "hang"):  # in the other cell
        assert FAST in timed(result, "layers")


def test_rounds_are_complete(with_faults):
    for group in with_faults[1].groups:
        assert len({len(timing.seconds) for timing in group.timings.values()}) == 1, group.name


def test_it_does_not_claim_to_have_measured(with_faults):
    _, result, _, output = with_faults
    assert result.machine["device"] == "dry run"
    assert "Its times are not measurements" in output
