"""`make gpu` rehearsed without a GPU: every stage runs, and a fault in one leaves the others' results."""

import json

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu.stages import STAGES, job
from bench.results.names import FAST
from bench.results.schema import Result
from tests.support.processes import start


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
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package"))
    assert gpu.main(["--dry-run"]) == 2
    assert "needs no_such_package" in capsys.readouterr().err


def test_kernels_are_demanded_where_they_are_timed(tmp_path):
    """On "auto", a kernel that fails would be replaced by PyTorch, and timed under our name."""
    for stage in STAGES:
        found = job(stage, tmp_path, "run", False, 1e9, 60.0)
        timed = not stage.tests and stage.name != "initialisation"  # there are no kernels in a solver
        assert (found.environment["MICA_BACKEND"] == "triton") == timed, stage.name
        assert found.seconds <= stage.seconds


def test_device_tests_run_to_the_end_on_all_cores(tmp_path):
    (stage,) = (one for one in STAGES if one.tests)
    found = job(stage, tmp_path, "run", False, 1e9, 60.0)
    assert "-x" not in found.command
    assert "-q" not in found.command
    assert found.command[found.command.index("--dist") + 1] == "worksteal"
    assert found.environment["MICA_TEST_DEVICE"] == "cuda"
    assert "TRITON_INTERPRET" not in found.environment


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory):
    """One run in which each kind of fault befalls a stage of its own."""
    faults = "kernels:wrong,bandwidth:raise,layers:kill,streams:hang"
    return rehearse(
        tmp_path_factory.mktemp("faults"), "--stages", "1,3,4,7,6", "--silence", "30", faults=faults
    )


def test_every_stage_is_told(with_faults):
    code, result, stages, output = with_faults
    assert code == 1, output
    assert [*stages] == ["kernels", "bandwidth", "layers", "streams", "initialisation"]
    assert result.stages == [*stages.values()]
    assert stages["initialisation"]["state"] == "passed", output


def test_a_wrong_kernel_is_named(with_faults):
    _, result, stages, _ = with_faults
    assert stages["kernels"]["state"] == "failed"
    failed = [one["name"] for one in result.checks if one["outcome"] == "failed"]
    assert any("up_projection" in name for name in failed)
    assert any(one["outcome"] == "passed" for one in result.checks)


def test_a_kernel_that_raises_has_no_number_and_the_copy_has(with_faults):
    _, result, stages, _ = with_faults
    assert stages["bandwidth"]["state"] == "failed"
    groups = [*result.select(suite="kernels")]
    assert groups
    assert {name for group in groups for name in group.rivals} == {"copy"}
    assert any("injected" in one["why"] for one in result.refused)


def test_after_a_crash_the_other_layers_are_timed(with_faults):
    _, result, _, _ = with_faults
    died = [one for one in result.refused if one["why"] == "the process died"]
    assert [one["rival"] for one in died] == [FAST]
    assert any(FAST in group.rivals for group in result.select(suite="layer"))
    assert all(len({len(rival.seconds) for rival in group.rivals.values()}) == 1 for group in result.groups)


def test_what_hangs_is_left_out(with_faults):
    _, result, stages, _ = with_faults
    hung = [one["name"] for one in result.checks if one.get("why", "").startswith("nothing was heard")]
    assert len(hung) == 1
    assert stages["streams"]["passed"] >= 1
    assert stages["streams"]["first_failed"] == hung


def test_it_does_not_claim_to_have_measured(with_faults):
    _, result, _, output = with_faults
    assert result.machine["device"] == "dry run"
    assert "not measurements" in output
