"""Compiles the C++ of this folder, once for each machine, Python and PyTorch, and keeps the result on disk.

What is built for one PyTorch does not load into another, so a file's name holds all that it depends on. It
appears whole, by a rename, under a lock that the operating system frees when a process dies. A compiler that
fails is not started again: its output is kept in the place of the result, until that file is deleted.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import uuid
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants

from mica.subspace.cache import distrusted

FOLDER = Path(__file__).parent
SOURCES = ("module.cpp", "check.h", "layer.h")
COMPILERS = ("c++", "g++", "clang++")
# Optimising more takes a quarter longer, and what is compiled here only calls PyTorch's operators.
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
LIBRARIES = ("torch_python", "torch", "torch_cpu", "c10")
_NO_COMPILER = f"there is no C++ compiler ({', '.join(COMPILERS)}, or what CXX names)"
_OTHER_FOLDER = "MICA_NATIVE has to name another folder"
TIME_LIMIT = 600  # seconds for the compiler: it takes 12 on a usual machine, 25 on a slow one


class BuildError(Exception):
    """Why there is no compiled module, in words for the user."""


def default_folder() -> Path:
    """``mica/native`` in the Hugging Face cache (HF_HOME)."""
    return Path(constants.HF_HOME) / "mica" / "native"


def built(folder: Path) -> Path:
    """The compiled module in this folder; where there is none, it is compiled first, which a line reports.

    Raises:
        BuildError: it cannot be compiled, or could not when it was tried before.
    """
    _refuse_system()
    path = folder / f"{_key()}.so"
    failure = path.with_suffix(".txt")
    try:
        if not path.exists():
            _refuse_failed(failure)
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                _build_if_missing(path, failure)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written ({error.strerror}), so {_OTHER_FOLDER}") from error
    for place in (folder, path):  # code that another user could have written is not run
        reason = distrusted(place)
        if reason is not None:
            raise BuildError(f"{place} {reason}, so {_OTHER_FOLDER}")
    return path


def _build_if_missing(path: Path, failure: Path) -> None:
    """Under the lock: another process may have built it, or failed, while this one waited."""
    if path.exists():
        return
    _refuse_failed(failure)
    for abandoned in path.parent.glob(f"{path.stem}.*.tmp"):  # by a process that was killed
        abandoned.unlink(missing_ok=True)
    _compile(path, failure)


def _refuse_failed(failure: Path) -> None:
    if failure.exists():
        raise BuildError(
            f"the C++ compiler failed before: delete {failure}, which has its output, to try again"
        )


def _compile(path: Path, failure: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise BuildError(_NO_COMPILER)
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    command = [*compiler, *_arguments(temporary)]
    what = f"mica: compiling C++ for PyTorch {torch.__version__}, once on this machine"
    print(what, file=sys.stderr, end=" ... ", flush=True)
    begin = time.monotonic()
    try:
        output = _failure_of(command)
    finally:
        print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    if output is None:
        os.replace(temporary, path)
        return
    temporary.unlink(missing_ok=True)
    failure.write_text(f"{shlex.join(command)}\n{output}", encoding="utf-8")
    raise BuildError(f"the C++ compiler failed: {failure} has its output")


def _failure_of(command: list[str]) -> str | None:
    """The output of a compiler that fails; None where it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {TIME_LIMIT} seconds"
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    return done.stdout + done.stderr if done.returncode else None


def _compiler() -> list[str] | None:
    """The command, of which there may be several words in the environment variable CXX."""
    requested = shlex.split(os.environ.get("CXX", ""))
    if requested:
        return requested if shutil.which(requested[0]) else None
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    return None


def _refuse_system() -> None:
    """What no compiler changes."""
    if platform.system() != "Linux":
        raise BuildError(f"the C++ has been tried on Linux only, not on {platform.system()}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("the C++ relies on the global interpreter lock, which this Python does not have")


def _includes() -> list[Path]:
    """Folders of headers: PyTorch's come with it, Python's perhaps not (python3-dev, python3-devel)."""
    root = Path(torch.__file__).parent / "include"
    includes = [root, root / "torch" / "csrc" / "api" / "include", Path(sysconfig.get_path("include"))]
    for needed in (
        includes[0] / "torch" / "csrc" / "autograd" / "python_variable.h",
        includes[2] / "Python.h",
    ):
        if not needed.exists():
            raise BuildError(f"a header is missing: {needed}")
    return includes


def _arguments(output: Path) -> list[str]:
    arguments = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    for folder in _includes():
        arguments += ["-isystem", str(folder)]
    libraries = Path(torch.__file__).parent / "lib"
    arguments += [str(FOLDER / SOURCES[0]), "-o", str(output), "-L", str(libraries)]
    arguments += [f"-l{library}" for library in LIBRARIES]
    return arguments


def _key() -> str:
    """Everything that the compiled module depends on."""
    facts = [
        torch.__version__,
        str(torch.version.git_version),
        str(torch.compiled_with_cxx11_abi()),
        str(sysconfig.get_config_var("SOABI")),
        platform.machine(),
        *FLAGS,
    ]
    digest = hashlib.sha256("\0".join(facts).encode())
    for name in SOURCES:
        digest.update((FOLDER / name).read_bytes())
    return f"mica_native-{digest.hexdigest()[:24]}"
