"""Builds of several processes at once, and of processes that are killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock
import pytest

from mica import native
from mica.native import build
from tests.mica.native.compilers import copying, has_ended, names

ROOT = Path(__file__).resolve().parents[3]
fork = multiprocessing.get_context("fork")


def started(code, *arguments, **environment):
    """Another process that runs this code."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def build_quietly(folder):
    """For a process of its own, whose traceback nobody wants to see."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    build.ensure_built(folder)


@pytest.mark.parametrize("fails", [False, True])
def test_processes_that_come_at_once_compile_once(fails, folder, compiler, compiled):
    """Those that waited for a failure do not try again."""
    compiler.does(f"sleep 0.5; {'exit 1' if fails else copying(compiled)}")
    processes = [fork.Process(target=build_quietly, args=(folder,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [fails] * 4
    assert len(compiler.runs()) == 1


def test_a_build_that_was_killed_is_done_by_the_next(
    folder, compiler, compiled, assert_layer_works, tmp_path, monkeypatch
):
    """Also while the compiler that it leaves behind still runs, and where half a file was written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compiler.does('head -c 100 "$0" > "$output"; sleep 600')
    process = fork.Process(target=build_quietly, args=(folder,))
    process.start()
    pid = compiler.pid()
    process.kill()
    process.join()
    (half,) = (path.with_suffix(".tmp") for path in folder.glob("*.lock"))
    half.write_bytes(compiled.read_bytes()[:1000])

    compiler.does(copying(compiled))
    assert_layer_works()
    assert native.why_not() is None
    os.killpg(pid, signal.SIGKILL)
    assert has_ended(pid)
    assert {path.suffix for path in folder.iterdir()} == {".so", ".lock"}


def test_ctrl_c_ends_the_compiler_and_the_next_process_builds(
    folder, compiler, compiled, assert_layer_works, monkeypatch
):
    popen = subprocess.Popen
    known = fork.Event()  # a signal within `Popen` comes before anybody knows whom to end

    def noted(*args, **options):
        process = popen(*args, **options)
        known.set()
        return process

    compiler.does("sleep 600")
    monkeypatch.setattr(subprocess, "Popen", noted)
    process = fork.Process(target=build_quietly, args=(folder,))
    process.start()
    pid = compiler.pid()
    assert known.wait(60)
    time.sleep(0.1)  # for the call to return
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1
    assert has_ended(pid)
    assert not names(folder, ".txt")

    compiler.does(copying(compiled))
    assert_layer_works()
    assert native.why_not() is None


def test_a_process_that_holds_the_lock_for_long(folder, compiler, assert_layer_works, monkeypatch):
    monkeypatch.setattr(build, "TIME_LIMIT", 0.3)
    lock = folder / f"{build._path(folder, build.EXTENSION).stem}.lock"
    folder.mkdir()
    with filelock.FileLock(lock):
        assert_layer_works()
    reason = native.why_not()
    assert reason.startswith(f"{folder} cannot be used, so MICA_NATIVE has to name another folder: ")
    assert str(lock) in reason
    assert not compiler.runs()


LAYER = """
import sys
import torch
import mica.fast
from mica import native
from tests.support.models import randomise, wrap
from tests.support.stock import step

torch.manual_seed(0)
model = randomise(wrap(torch.nn.Sequential(torch.nn.Linear(48, 32)), targets=["0"]))
output, gradients = step(model, torch.randn(5, 48))
print(native.why_not(), mica.fast.call_counts["linear_native"])
print(output.tolist(), {name: grad.tolist() for name, grad in gradients.items()})
"""


@pytest.mark.slow
def test_two_scripts_at_once(folder, compiler, compiled):
    """The whole of it, in processes as a user starts them: both work, and one says that it compiles."""
    compiler.does(f"sleep 2; {copying(compiled)}")
    scripts = [started(LAYER), started(LAYER), started(LAYER, MICA_NATIVE="0")]
    outputs = [script.communicate() for script in scripts]
    reasons, results = zip(*(out.splitlines() for out, _ in outputs), strict=True)
    assert reasons == ("None 1", "None 1", "MICA_NATIVE=0 0")
    assert len(set(results)) == 1
    said = [line for _, errors in outputs for line in errors.splitlines() if line.startswith("mica: ")]
    assert [line.split()[1] for line in said] == ["compiling"]
    assert len(compiler.runs()) == 1
