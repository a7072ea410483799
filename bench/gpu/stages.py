"""The stages of a run on a GPU, the most telling first: each a process with a time limit, and a question."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from bench.measure.machine import ROOT
from bench.run import Job, pytest, suite

DRY_SECONDS = 600.0  # a stage's limit in a dry run: on a busy machine an import alone can take minutes
DRY_TESTS = ("kernels/test_fused_linear.py",)
DRY_SELECTION = "not agrees and not configuration and not any_shape"  # the others take minutes
TESTS = (
    "kernels",
    "mica/paths/test_parity.py",
    "mica/paths/test_triton_path.py",
    "mica/paths/test_triton_path_experts.py",
)


class Stage(NamedTuple):
    """``seconds``: its limit on a GPU; ``files``: all of ``bench/suites``, or all of ``tests``."""

    name: str
    seconds: float
    files: tuple[str, ...]
    selection: str = ""  # as with pytest's -k
    backend: str = "triton"  # kernels or an error: what is timed under our name is ours
    parallel: bool = False  # on all cores, so that kernels are compiled at once

    @property
    def tests(self) -> bool:
        return not self.files[0].startswith("bench_")


STAGES = (
    # is each kernel right, and reproducible?
    Stage("tests", 160, TESTS, parallel=True),
    # how close to a copy and to cuBLAS is each kernel, and in which configuration?
    Stage("bandwidth", 120, ("bench_kernels.py",)),
    # what does an adapter cost a layer?
    Stage("layers", 200, ("bench_layer.py",), "not forms"),
    # what does a model gain in time and memory, with the same losses?
    Stage("model", 160, ("bench_block.py", "bench_step.py", "bench_experts.py")),
    # how fast is the initialisation of an adapter?
    Stage("initialisation", 100, ("bench_subspace.py", "bench_adapter.py"), backend="auto"),
    # do graphs, streams and torch.compile give the same results? In which kernels does a step spend its time?
    Stage("streams", 100, ("device/test_streams.py", "device/test_profile.py")),
    # is another form of a layer faster?
    Stage("forms", 120, ("bench_layer.py",), "forms"),
)


def job(stage: Stage, results: Path, is_dry: bool, seconds: float, silence: float) -> Job:
    """The process of a stage; ``results``: the run's file; ``seconds``: what is left of its budget."""
    environment = {
        "MICA_BACKEND": stage.backend,
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "1" if is_dry else "0",
        "MICA_TUNE": str(results.parent),  # what the device chooses comes back with the results
    }
    if is_dry:
        environment["MICA_BENCH_SIZE"] = "dry"
    if stage.tests:
        environment["MICA_BACKEND"] = "auto"  # the tests choose the backend
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        if not is_dry:
            environment["MICA_TEST_DEVICE"] = "cuda"
        command = _tests(stage, is_dry, results.with_name(f"{results.stem}-{stage.name}.xml"))
    else:
        command = suite(list(stage.files), "-k", stage.selection)
    limit = min(DRY_SECONDS if is_dry else stage.seconds, seconds)
    return Job(stage.name, command, environment, limit, silence)


def _tests(stage: Stage, is_dry: bool, report: Path) -> list[str]:
    """To the end, whatever fails."""
    # what a user's settings add could duplicate an option or stop at the first failure
    options = ["-o", "addopts=--import-mode=importlib --strict-markers -p no:cacheprovider", "--tb=short"]
    options += [f"--junitxml={report}", "-o", "junit_family=xunit2", "-p", "bench.measure.watching"]
    files = stage.files
    if stage.parallel:
        options += ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
        if is_dry:
            files = DRY_TESTS
            options += ["-k", DRY_SELECTION]
    return pytest(*(ROOT / "tests" / file for file in files), *options)
