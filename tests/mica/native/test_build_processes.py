"""Builds of several processes at once, and of processes that are killed."""

import multiprocessing
import os
import signal
import tempfile

import filelock
import pytest

from mica import native
from mica.native import build
from tests.mica.native.compilers import copying, has_ended

fork = multiprocessing.get_context("fork")


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


def test_a_process_that_holds_the_lock_for_long(folder, compiler, assert_layer_works, monkeypatch):
    monkeypatch.setattr(build, "TIME_LIMIT", 0.3)
    lock = folder / f"{build._path(folder, build.SOURCE).stem}.lock"
    folder.mkdir()
    with filelock.FileLock(lock):
        assert_layer_works()
    reason = native.why_not()
    assert reason.startswith(f"{folder} cannot be used, so MICA_NATIVE has to name another folder: ")
    assert str(lock) in reason
    assert not compiler.runs()
