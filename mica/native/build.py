"""Compiles the C++ of this folder, once for each machine, Python and PyTorch, and keeps the result on disk.

What is built for one PyTorch does not load into another, so a file's name holds all that it depends on. The
compiler works in a temporary folder. A file appears here whole, by a rename, under a lock that the operating
system frees when a process dies. It ends with a checksum: a crash of the machine, or a copy of the cache that
was broken off, may leave half of it, and loading that would end the process with a bus error. A compiler that
fails is not started again for an hour, and its output is kept. By then a full disk, too little memory or a
lack of headers may have been mended.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import filelock
import torch
from huggingface_hub import constants

from mica.folders import why_untrusted

COMPILERS = ("c++", "g++", "clang++")
# Optimising more takes a quarter longer, and most of what is compiled only calls PyTorch's operators. The
# loops ask for more themselves.
FLAGS = ("-O1", "-std=c++20", "-fopenmp-simd", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
LIBRARIES = ("torch_python", "torch", "torch_cpu", "c10")
# Seconds for the compiler, and for those who wait: 15 on an idle core of an AMD EPYC, 65 on a busy one.
TIME_LIMIT = 300
FAILURE_COUNTS_FOR = 3600  # seconds


class BuildError(Exception):
    """Why there is no compiled module, in words for the user."""


# A Python module, whose initialisation is PyInit_mica_native. It includes the other files that it needs.
SOURCE = Path(__file__).with_name("mica_native.cpp")


def default_folder() -> Path:
    """``mica/native`` in the Hugging Face cache (HF_HOME)."""
    return Path(constants.HF_HOME) / "mica" / "native"


def ensure_built(folder: Path, source: Path = SOURCE) -> Path:
    """The compiled module in this folder; where there is none, it is compiled first, as stderr then says.

    Raises:
        BuildError: it cannot be compiled, or could not when it was tried before.
    """
    if platform.system() != "Linux":
        raise BuildError(f"the C++ has been tried on Linux only, not on {platform.system()}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("the C++ relies on the global interpreter lock, which this Python does not have")
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)  # even if the umask lets others write
        reason = why_untrusted(folder)
        if reason is not None:  # code that another user could have written is not run
            raise BuildError(f"{folder} {reason}, so MICA_NATIVE has to name another folder")
        path = _path(folder, source)
        if not _is_usable(path):
            _build(path, source)
    except (OSError, NotImplementedError) as error:  # the second where a disk has no locks; also a timeout
        raise BuildError(
            f"{folder} cannot be used, so MICA_NATIVE has to name another folder: {error}"
        ) from error
    return path


def is_built(folder: Path) -> bool:
    """Whether `ensure_built` would compile nothing."""
    try:
        return _is_usable(_path(folder, SOURCE))
    except OSError:
        return False


def _path(folder: Path, source: Path) -> Path:
    """The name of the module's file holds a hash of everything that the compiled code depends on."""
    facts = (
        torch.__version__,
        torch.version.git_version,
        torch.compiled_with_cxx11_abi(),
        sysconfig.get_config_var("SOABI"),
        platform.machine(),
        FLAGS,
    )
    digest = hashlib.sha256(repr(facts).encode())
    for file in sorted([*source.parent.glob("*.cpp"), *source.parent.glob("*.h")]):
        digest.update(file.read_bytes())
    return folder / f"{source.stem}-{digest.hexdigest()[:24]}.so"


def _is_usable(path: Path) -> bool:
    """Whether it is there and whole, and no other user can have written it."""
    if why_untrusted(path) is not None or not path.exists():
        return False
    content = path.read_bytes()
    code = content[: -hashlib.sha256().digest_size]
    return content == _sealed(code)


def _sealed(code: bytes) -> bytes:
    """The code with its checksum at the end, which no loader looks at."""
    return code + hashlib.sha256(code).digest()


def _build(path: Path, source: Path) -> None:
    """Compile it, if no other process does so meanwhile."""
    compiler = _compiler()
    # That one fails says nothing of another, nor of another program behind the same name.
    program = os.path.realpath(shutil.which(compiler[0]))
    identity = hashlib.sha256(repr((program, compiler)).encode()).hexdigest()[:8]
    failure = path.with_suffix(f".{identity}.txt")
    with (
        filelock.FileLock(path.with_suffix(".lock"), timeout=TIME_LIMIT),
        tempfile.TemporaryDirectory() as scratch,
    ):
        if _is_usable(path):
            return
        if failure.exists() and time.time() - failure.stat().st_mtime < FAILURE_COUNTS_FOR:
            raise BuildError(
                f"the C++ compiler failed within the last hour: delete {failure}, which has its output, "
                "to try again now"
            )
        output = Path(scratch) / path.name
        command = [*compiler, *_arguments(source, output)]
        takes = "about 15 seconds of one core, longer on a busy machine"
        say(f"compiling C++ for PyTorch {torch.__version__}, once on this machine: {takes}")
        start = time.monotonic()
        problem = _problem_of(command)
        if problem is None and not output.exists():
            problem = "it has written no file"
        if problem is not None:
            text = f"{shlex.join(command)}\n{problem}\n"
            failure.write_text(text, encoding="utf-8", errors="replace")
            say("the C++ compiler failed, so layers run from Python, with the same results")
            raise BuildError(f"the C++ compiler failed: {failure} has its output")
        temporary = path.with_suffix(".tmp")  # which only who holds the lock writes, and no compiler
        temporary.write_bytes(_sealed(output.read_bytes()))
        temporary.chmod(0o644)
        temporary.replace(path)
        say(f"the C++ was compiled in {time.monotonic() - start:.0f} s")


def _problem_of(command: list[str]) -> str | None:
    """The output of a compiler that fails; None where it does not."""
    try:
        # in a session of its own: a compiler is several processes, and all of them have to end
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=TIME_LIMIT)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"it was stopped after {TIME_LIMIT} seconds"
    return output if process.returncode else None


def say(text: str) -> None:
    """A whole line on stderr at once, as several processes may write; without a terminal nothing is said."""
    with contextlib.suppress(OSError, ValueError):
        print(f"mica: {text}", file=sys.stderr, flush=True)


def _compiler() -> list[str]:
    """The command: what the environment variable CXX holds, split at spaces, or one of the usual ones."""
    words = os.environ.get("CXX", "").split()
    if words and shutil.which(words[0]) is None:
        raise BuildError(f"there is no compiler {words[0]}, which CXX names")
    if words:
        return words
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"there is no C++ compiler: neither {' nor '.join(COMPILERS)}, and CXX is not set")


def _arguments(source: Path, output: Path) -> list[str]:
    root = Path(torch.__file__).parent
    python = sysconfig.get_path("include")
    if not os.path.exists(f"{python}/Python.h"):  # PyTorch's headers come with it
        raise BuildError(f"there is no {python}/Python.h: the package python3-dev or python3-devel has it")
    return [
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", f"{root}/include", "-isystem", python),
        *(str(source), "-o", str(output), f"-L{root}/lib"),
        *(f"-l{library}" for library in LIBRARIES),
    ]
