"""Whatever befalls the build, a layer works, and what runs from Python for it has a clear reason."""

import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import filelock
import pytest
import torch

from mica import native
from mica.native import build
from tests.support.compilers import Compiler, awaited, copying, has_ended

ROOT = Path(__file__).resolve().parents[3]
fork = multiprocessing.get_context("fork")


def names(folder, ending):
    return sorted(path.name for path in folder.glob(f"*{ending}"))


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
    build.built(folder)


# What is built


def test_it_is_compiled_once_and_a_layer_works(folder, compiler, assert_layer_works, capfd, forget):
    assert_layer_works()
    assert native.why_not() is None
    said = capfd.readouterr().err
    version = re.escape(torch.__version__)
    start = rf"mica: compiling C\+\+ for PyTorch {version}, once on this machine: about half a minute\n"
    assert re.fullmatch(start + r"mica: compiled in \d+ s\n", said)
    assert len(names(folder, ".so")) == 1
    assert not names(folder, ".tmp") + names(folder, ".txt")

    forget()
    assert_layer_works()
    assert native.why_not() is None
    assert capfd.readouterr().err == ""
    assert len(compiler.runs()) == 1


def test_a_terminal_that_is_gone_does_not_matter(folder, compiler, monkeypatch):
    with open(os.devnull, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
    assert build.built(folder).exists()


@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_what_it_makes_it_trusts(umask, folder, compiler, tmp_path, monkeypatch):
    folder = tmp_path / "not" / "yet" / "there"
    compiler.does(f'{copying(build.built(tmp_path / "other"))}; chmod 777 "$output"')
    before = os.umask(umask)
    try:
        path = build.built(folder)
    finally:
        os.umask(before)
    for made in (path, folder):
        assert not made.stat().st_mode & 0o022
    runs = len(compiler.runs())
    assert build.built(folder) == path
    assert len(compiler.runs()) == runs


FACTS = {
    "version": (torch, "__version__", "2.99.0"),
    "git version": (torch.version, "git_version", "0123456"),
    "ABI of C++": (torch, "compiled_with_cxx11_abi", lambda: False),
    "machine": (platform, "machine", lambda: "riscv64"),
    "flags": (build, "FLAGS", ("-O0", *build.FLAGS[1:])),
}


@pytest.mark.parametrize("fact", FACTS)
def test_another_pytorch_or_machine_has_a_file_of_its_own(fact, folder, compiler, monkeypatch):
    path = build.built(folder)
    with monkeypatch.context() as patch:
        patch.setattr(*FACTS[fact])
        other = build.built(folder)
        assert build.built(folder) == other
    assert build.built(folder) == path
    assert names(folder, ".so") == sorted([path.name, other.name])
    assert len(compiler.runs()) == 2


def test_so_has_another_python(folder, compiler, monkeypatch):
    path = build.built(folder)
    found = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: "cpython-399" if name == "SOABI" else found(name)
    )
    assert build.built(folder) != path


@pytest.mark.parametrize("name", build.SOURCES)
def test_so_has_another_source(name, folder, compiler, tmp_path, monkeypatch):
    path = build.built(folder)
    shutil.copytree(build.FOLDER, tmp_path / "sources")
    monkeypatch.setattr(build, "FOLDER", tmp_path / "sources")
    assert build.built(folder) == path
    with open(tmp_path / "sources" / name, "a") as source:
        source.write("// changed\n")
    assert build.built(folder) != path


def test_all_sources_are_known():
    """One that is not in the file's name would not be compiled again when it changes."""
    found = {path.name for pattern in ("*.cpp", "*.h") for path in build.FOLDER.glob(pattern)}
    assert found == set(build.SOURCES)


# Compilers


def test_no_compiler_until_there_is_one(folder, compiler, assert_layer_works, tmp_path, monkeypatch, forget):
    quick = os.environ["CXX"]
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv("CXX")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "empty"))
        assert_layer_works()
        assert native.why_not() == (
            "there is no C++ compiler: neither c++ nor g++ nor clang++, and CXX is not set"
        )
    forget()
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    assert native.why_not() == "there is no compiler no-such-compiler, which CXX names"

    forget()
    monkeypatch.setenv("CXX", quick)
    assert native.why_not() is None


def test_the_first_of_the_usual_compilers_is_taken(folder, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", " ")
    for name in ("g++", "clang++"):
        shutil.copy(compiler.path, tmp_path / "bin" / name)
    monkeypatch.setattr(shutil, "which", lambda name: (tmp_path / "bin" / name).exists() or None)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert build._compiler() == ["g++"]
    build.built(folder)
    assert len(compiler.runs()) == 1


def test_cxx_may_have_several_words(folder, compiler, monkeypatch, assert_layer_works):
    monkeypatch.setenv("CXX", f"sh {compiler.command} --launcher 'two words'")
    assert_layer_works()
    assert native.why_not() is None
    (run,) = compiler.runs()
    assert run.startswith("--launcher two words -O1 -std=c++20 ")


def test_cxx_that_is_no_command(folder, compiler, monkeypatch, assert_layer_works):
    monkeypatch.setenv("CXX", "g++ 'open")
    assert_layer_works()
    assert native.why_not() == "CXX=g++ 'open is not a command (No closing quotation)"


FAULTS = {
    "an error": ("printf 'layer.h:1: error: no such header \\377\\n' >&2; exit 1", "no such header"),
    "on stdout": ("echo no licence; exit 3", "no licence"),
    "killed": ("kill -9 $$", ""),
    "half a file": ('echo half > "$output"; exit 1', ""),
    "no file": ("exit 0", "it has written no file"),
}


@pytest.mark.parametrize(("body", "output"), FAULTS.values(), ids=FAULTS)
def test_a_compiler_that_fails_is_not_started_again(
    body, output, folder, compiler, assert_layer_works, capfd, compiled, forget
):
    compiler.does(body)
    assert_layer_works()
    (name,) = names(folder, ".txt")
    failure = folder / name
    assert native.why_not() == f"the C++ compiler failed: {failure} has its output"
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("mica: compiling C++")
    assert re.fullmatch(
        r"mica: the C\+\+ compiler failed after \d+ s, so layers run from Python, with the same results", last
    )
    command, rest = failure.read_text().split("\n", 1)
    assert shlex.split(command)[0] == str(compiler.path)
    assert output in rest
    assert not names(folder, ".so") + names(folder, ".tmp")

    forget()
    assert_layer_works()
    before = f"the C++ compiler failed before: delete {failure}, which has its output, to try again"
    assert native.why_not() == before
    assert capfd.readouterr().err == ""
    assert len(compiler.runs()) == 1

    failure.unlink()
    compiler.does(copying(compiled))
    forget()
    assert_layer_works()
    assert native.why_not() is None


def test_a_compiler_that_cannot_be_run(folder, compiler, assert_layer_works):
    compiler.path.write_bytes(b"\x7fELF of another machine")
    assert_layer_works()
    (name,) = names(folder, ".txt")
    assert (folder / name).read_text().endswith("it cannot be run: Exec format error\n")


def test_a_compiler_that_hangs_ends_with_all_its_processes(
    folder, compiler, assert_layer_works, tmp_path, monkeypatch
):
    monkeypatch.setattr(build, "TIME_LIMIT", 2)
    child = tmp_path / "child"
    compiler.does(f"sleep 600 & echo $! > {shlex.quote(str(child))}; wait")
    assert_layer_works()
    (name,) = names(folder, ".txt")
    assert native.why_not() == f"the C++ compiler failed: {folder / name} has its output"
    assert (folder / name).read_text().endswith("\nit was stopped after 2 seconds\n")
    assert has_ended(compiler.pid())
    assert has_ended(int(awaited(child)))


# Processes


def test_processes_that_come_at_once_compile_once(folder, compiler, compiled):
    compiler.does(f"sleep 0.5; {copying(compiled)}")
    processes = [fork.Process(target=build_quietly, args=(folder,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert len(compiler.runs()) == 1


def test_those_that_waited_for_a_failure_do_not_try(folder, compiler):
    compiler.does("sleep 0.5; exit 1")
    processes = [fork.Process(target=build_quietly, args=(folder,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [1, 1, 1]
    assert len(compiler.runs()) == 1


def test_a_build_that_was_killed_is_done_by_the_next(folder, compiler, compiled, assert_layer_works):
    compiler.does('head -c 1000 "$0" > "$output"; sleep 600')
    process = fork.Process(target=build_quietly, args=(folder,))
    process.start()
    pid = compiler.pid()
    while not names(folder, ".tmp"):
        time.sleep(0.01)
    process.kill()
    process.join()
    os.killpg(pid, signal.SIGKILL)
    assert has_ended(pid)
    assert names(folder, ".tmp")

    compiler.does(copying(compiled))
    assert_layer_works()
    assert native.why_not() is None
    assert not names(folder, ".tmp")


def test_ctrl_c_ends_the_compiler_and_the_next_process_builds(folder, compiler, compiled, assert_layer_works):
    compiler.does("sleep 600")
    process = fork.Process(target=build_quietly, args=(folder,))
    process.start()
    pid = compiler.pid()
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
    lock = folder / f"{build._key()}.lock"
    folder.mkdir()
    with filelock.FileLock(lock):
        assert_layer_works()
    assert native.why_not() == f"another process has held {lock} for 0.3 seconds"
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
    assert [line.split()[1] for line in said] == ["compiling", "compiled"]
    assert len(compiler.runs()) == 1


BUILD = """
import sys
from pathlib import Path
from mica.native import build

print(build.built(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_the_real_compiler_is_killed_and_starts_again(folder, tmp_path, compiled, assert_layer_works):
    real = Compiler(tmp_path / "bin", f'exec {shlex.join(build._compiler())} "$@"')
    process = started(BUILD, folder, CXX=real.command)
    pid = real.pid()
    time.sleep(3)  # it takes four times as long, or more
    process.kill()
    process.communicate()
    os.killpg(pid, signal.SIGKILL)
    assert has_ended(pid)

    process = started(BUILD, folder, CXX=real.command)
    output, said = process.communicate()
    assert process.returncode == 0, said
    assert names(folder, "") == sorted([Path(output.strip()).name, f"{build._key()}.lock"])
    assert len(real.runs()) == 2
    assert_layer_works()
    assert native.why_not() is None


# Files


def test_damaged_files_are_built_again(folder, compiler, assert_layer_works):
    """Loading the first 1000 bytes, or half of it, would end this process with a bus error."""
    path = build.built(folder)
    whole = path.read_bytes()
    damaged = [b"", whole[:1000], whole[: len(whole) // 2], whole[:-1], b"garbage", bytes(len(whole))]
    damaged.append(whole[:5000] + b"x" + whole[5001:])
    for content in damaged:
        path.write_bytes(content)
        assert build.built(folder) == path
        assert path.read_bytes() == whole
    assert len(compiler.runs()) == 1 + len(damaged)
    assert_layer_works()
    assert native.why_not() is None


def test_a_whole_file_that_does_not_load(folder, compiler, assert_layer_works, forget):
    """As on an older system than where it was built, or on a disk from which nothing may be executed."""
    compiler.does('echo "no library" > "$output"')
    assert_layer_works()
    (name,) = names(folder, ".so")
    assert native.why_not() == (
        f"what was compiled cannot be loaded ({folder / name}: file too short): "
        "delete the file, or name another folder with MICA_NATIVE"
    )
    forget()
    assert_layer_works()
    assert len(compiler.runs()) == 1


@pytest.mark.parametrize("place", ["a file", "in a file", "/proc/mica"])
def test_a_folder_that_cannot_be_made(place, compiler, forget, assert_layer_works, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folders = {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "folder"}
    folder = folders.get(place, Path(place))
    monkeypatch.setenv("MICA_NATIVE", str(folder))
    assert_layer_works()
    reasons = {"a file": "File exists", "in a file": "Not a directory"}
    reason = reasons.get(place, "No such file or directory")
    assert native.why_not() == (
        f"{folder} cannot be used ({reason}), so MICA_NATIVE has to name another folder"
    )
    assert not compiler.runs()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotImplementedError()])
def test_a_folder_that_may_only_be_read_or_has_no_locks(
    error, folder, compiler, assert_layer_works, monkeypatch, forget
):
    def refused(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(filelock, "FileLock", refused)
        assert_layer_works()
        what = "cannot be used (Permission denied)"
        if isinstance(error, NotImplementedError):
            what = "is on a disk without file locks"
        assert native.why_not() == f"{folder} {what}, so MICA_NATIVE has to name another folder"
    assert not compiler.runs()

    build.built(folder)
    monkeypatch.setattr(filelock, "FileLock", refused)
    forget()
    assert_layer_works()  # it is there: nothing need be written
    assert native.why_not() is None


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_refused(mode, folder, compiler, assert_layer_works, forget):
    """Before anything is compiled, and although the file itself is in order."""
    path = build.built(folder)
    for _ in range(2):
        folder.chmod(mode)
        assert_layer_works()
        assert native.why_not() == (
            f"{folder} can be written by others (mode {mode:o}), so MICA_NATIVE has to name another folder"
        )
        path.unlink(missing_ok=True)
        forget()
    assert len(compiler.runs()) == 1
    folder.chmod(0o755)
    assert_layer_works()
    assert native.why_not() is None


def test_a_file_that_others_could_write_is_built_again(folder, compiler):
    path = build.built(folder)
    path.chmod(0o664)
    assert build.built(folder) == path
    assert not path.stat().st_mode & 0o022
    assert len(compiler.runs()) == 2


# Headers and systems


def test_python_without_headers(folder, compiler, assert_layer_works, tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert_layer_works()
    assert native.why_not() == (
        f"there is no {tmp_path}/include/Python.h: the package python3-dev or python3-devel has it"
    )
    assert not compiler.runs()
    assert not names(folder, ".txt")


def test_pytorch_without_headers(folder, compiler, assert_layer_works, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
        reason = native.why_not()
    assert reason == f"this PyTorch came without its headers, which would be in {tmp_path}/include"
    assert_layer_works()
    assert not compiler.runs()


def test_mica_without_its_sources(folder, compiler, assert_layer_works, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert_layer_works()
    assert native.why_not() == f"{tmp_path}/module.cpp cannot be read (No such file or directory)"


@pytest.mark.parametrize("system", ["Windows", "Darwin"])
def test_other_systems(system, folder, compiler, assert_layer_works, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    assert_layer_works()
    assert native.why_not() == f"the C++ has been tried on Linux only, not on {system}"
    assert not folder.exists()


def test_a_python_without_its_lock(folder, compiler, monkeypatch):
    found = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else found(name)
    )
    reason = "the C++ relies on the global interpreter lock, which this Python does not have"
    assert native.why_not() == reason
