"""What is compiled, by which compilers, on which systems; elsewhere a layer works and has a reason."""

import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import time

import pytest
import torch

from mica import native
from mica.native import build
from tests.mica.native.compilers import Compiler, awaited, copying, has_ended, names

# What is built


def test_it_is_compiled_once_and_a_layer_works(folder, compiler, assert_layer_works, capfd, forget):
    assert_layer_works()
    assert native.why_not() is None
    said = capfd.readouterr().err
    version = re.escape(torch.__version__)
    assert re.fullmatch(
        rf"mica: compiling C\+\+ for PyTorch {version}, once on this machine: "
        r"about 15 seconds of one core, longer on a busy machine\n"
        r"mica: the C\+\+ was compiled in \d+ s\n",
        said,
    )
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
    assert build.ensure_built(folder).exists()


@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_what_it_makes_it_trusts(umask, folder, compiler, tmp_path, monkeypatch):
    folder = tmp_path / "not" / "yet" / "there"
    compiler.does(f'{copying(build.ensure_built(tmp_path / "other"))}; chmod 777 "$output"')
    before = os.umask(umask)
    try:
        path = build.ensure_built(folder)
    finally:
        os.umask(before)
    for made in (path, folder):
        assert not made.stat().st_mode & 0o022
    runs = len(compiler.runs())
    assert build.ensure_built(folder) == path
    assert len(compiler.runs()) == runs


SOURCES = sorted(path.name for path in build.SOURCE.parent.iterdir() if path.suffix in (".cpp", ".h"))
FACTS = {
    "version": (torch, "__version__", "2.99.0"),
    "git version": (torch.version, "git_version", "0123456"),
    "ABI of C++": (torch, "compiled_with_cxx11_abi", lambda: False),
    "machine": (platform, "machine", lambda: "riscv64"),
    "flags": (build, "FLAGS", ("-O0", *build.FLAGS[1:])),
    "Python": (sysconfig, "get_config_var", {"SOABI": "cpython-399"}.get),
}


@pytest.mark.parametrize("fact", FACTS)
def test_another_pytorch_or_machine_has_a_file_of_its_own(fact, folder, compiler, monkeypatch):
    path = build.ensure_built(folder)
    with monkeypatch.context() as patch:
        patch.setattr(*FACTS[fact])
        other = build.ensure_built(folder)
        assert build.ensure_built(folder) == other
    assert build.ensure_built(folder) == path
    assert names(folder, ".so") == sorted([path.name, other.name])
    assert len(compiler.runs()) == 2


@pytest.mark.parametrize("name", SOURCES)
def test_so_has_another_source(name, folder, compiler, tmp_path):
    path = build.ensure_built(folder)
    sources = tmp_path / "sources"
    shutil.copytree(build.SOURCE.parent, sources)
    copied = sources / build.SOURCE.name
    assert build.ensure_built(folder, copied) == path
    with open(sources / name, "a") as source:
        source.write("// changed\n")
    assert build.ensure_built(folder, copied) != path


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
    assert last == "mica: the C++ compiler failed, so layers run from Python, with the same results"
    command, rest = failure.read_text().split("\n", 1)
    assert shlex.split(command)[0] == str(compiler.path)
    assert output in rest
    assert not names(folder, ".so") + names(folder, ".tmp")

    forget()
    assert_layer_works()
    assert native.why_not() == (
        f"the C++ compiler failed within the last hour: delete {failure}, "
        "which has its output, to try again now"
    )
    assert capfd.readouterr().err == ""
    assert len(compiler.runs()) == 1

    failure.unlink()
    compiler.does(copying(compiled))
    forget()
    assert_layer_works()
    assert native.why_not() is None


def test_a_failure_counts_for_an_hour(folder, compiler, compiled):
    """A full disk or a lack of memory passes, and headers that were missing get installed."""
    compiler.does("echo 'fatal error: No space left on device'; exit 1")
    with pytest.raises(build.BuildError, match="has its output"):
        build.ensure_built(folder)
    compiler.does(copying(compiled))
    (name,) = names(folder, ".txt")
    for minutes, is_tried in ((59, False), (61, True)):
        at = time.time() - 60 * minutes
        os.utime(folder / name, (at, at))
        if is_tried:
            assert build.ensure_built(folder).exists()
        else:
            with pytest.raises(build.BuildError, match="within the last hour"):
                build.ensure_built(folder)


@pytest.mark.parametrize("named", [True, False], ids=["CXX", "PATH"])
def test_another_compiler_is_tried_at_once(named, folder, compiler, compiled, tmp_path, monkeypatch):
    """One that CXX names, or another file behind the same name, as an update leaves."""
    failing, working = (Compiler(tmp_path / name, "exit 1") for name in ("old", "new"))
    working.does(copying(compiled))
    (tmp_path / "bin" / "c++").symlink_to(failing.path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", str(failing.path) if named else "")
    for message in ("has its output", "within the last hour"):
        with pytest.raises(build.BuildError, match=message):
            build.ensure_built(folder)
    if named:
        monkeypatch.setenv("CXX", str(working.path))
    else:
        (tmp_path / "bin" / "c++").unlink()
        (tmp_path / "bin" / "c++").symlink_to(working.path)
    assert build.ensure_built(folder).exists()
    assert len(failing.runs()) == len(working.runs()) == 1


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


# Where nothing can be compiled

NOWHERE = {  # what is missing: (what is replaced, the reason)
    "Python's headers": (
        lambda patch, folder: patch.setattr(sysconfig, "get_path", lambda name: f"{folder}/{name}"),
        "there is no {}/include/Python.h: the package python3-dev or python3-devel has it",
    ),
    "Linux": (
        lambda patch, folder: patch.setattr(platform, "system", lambda: "Darwin"),
        "the C++ has been tried on Linux only, not on Darwin",
    ),
    "the lock": (
        lambda patch, folder: patch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 1}.get),
        "the C++ relies on the global interpreter lock, which this Python does not have",
    ),
}


@pytest.mark.parametrize("missing", NOWHERE)
def test_where_nothing_can_be_compiled(missing, folder, compiler, assert_layer_works, tmp_path, monkeypatch):
    replace, reason = NOWHERE[missing]
    with monkeypatch.context() as patch:
        replace(patch, tmp_path)
        assert native.why_not() == reason.format(tmp_path)
    assert_layer_works()
    assert not compiler.runs()
    assert not folder.exists() or not names(folder, ".txt")
