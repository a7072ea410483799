"""Compiles the C++ of this folder, once for each machine, Python and PyTorch, and keeps the result on disk.

What is built for one PyTorch does not load into another, so a file's name holds all that it depends on. It
appears whole, by a rename, under a lock that the operating system frees when a process dies, and ends with a
checksum: loading half a file would kill the process. A compiler that fails is not started again for an hour,
and its output is kept. By then a full disk, too little memory or a lack of headers may have been mended.
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
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import filelock
import torch
from huggingface_hub import constants

from mica.folders import why_untrusted

COMPILERS = ("c++", "g++", "clang++")
# Optimising more takes a quarter longer, and most of what is compiled only calls PyTorch's operators. The
# loops ask for more themselves.
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
LIBRARIES = ("torch_python", "torch", "torch_cpu", "c10")
# Seconds for the compiler, and for those who wait: 15 on an idle core of an AMD EPYC, 65 on a busy one.
TIME_LIMIT = 300
FAILURE_COUNTS_FOR = 3600  # seconds
_OTHER_FOLDER = "MICA_NATIVE has to name another folder"
_CHECKSUM_BYTES = 32


class BuildError(Exception):
    """Why there is no compiled module, in words for the user."""


class Sources(NamedTuple):
    """What a module of Python is compiled from: the first file includes the others."""

    name: str  # of the module, whose initialisation is PyInit_name
    folder: Path
    files: tuple[str, ...]


_FILES = ("module.cpp", "check.h", "layer.h", "loops.h", "merging.h")
NATIVE = Sources("mica_native", Path(__file__).parent, _FILES)


def default_folder() -> Path:
    """``mica/native`` in the Hugging Face cache (HF_HOME)."""
    return Path(constants.HF_HOME) / "mica" / "native"


def built(folder: Path, sources: Sources = NATIVE) -> Path:
    """The compiled module in this folder; where there is none, it is compiled first, as stderr then says.

    Raises:
        BuildError: it cannot be compiled, or could not when it was tried before.
    """
    _refuse_system()
    path = _path(folder, sources)
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)  # even if the umask lets others write
        _refuse_distrusted(folder)
        if not _is_usable(path):
            _build(path, sources)
    except filelock.Timeout as error:
        raise BuildError(f"another process has held {error.lock_file} for {TIME_LIMIT} seconds") from error
    except OSError as error:
        raise BuildError(f"{folder} cannot be used ({error.strerror}), so {_OTHER_FOLDER}") from error
    except NotImplementedError as error:  # from older releases of filelock
        raise BuildError(f"{folder} is on a disk without file locks, so {_OTHER_FOLDER}") from error
    return path


def is_built(folder: Path, sources: Sources = NATIVE) -> bool:
    """Whether `built` would compile nothing."""
    try:
        return _is_usable(_path(folder, sources))
    except (BuildError, OSError):
        return False


def _path(folder: Path, sources: Sources) -> Path:
    return folder / f"{_key(sources)}.so"


def _refuse_distrusted(folder: Path) -> None:
    """Code that another user could have written is not run."""
    reason = why_untrusted(folder)
    if reason is not None:
        raise BuildError(f"{folder} {reason}, so {_OTHER_FOLDER}")


def _is_usable(path: Path) -> bool:
    """Whether it is there and whole, and no other user can have written it."""
    if why_untrusted(path) is not None:
        return False
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return content[-_CHECKSUM_BYTES:] == hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest()


def _build(path: Path, sources: Sources) -> None:
    """Compile it, if no other process does so meanwhile."""
    compiler = _compiler()
    failure = path.with_suffix(f".{_identity(compiler)}.txt")
    _refuse_failed(failure)
    with filelock.FileLock(path.with_suffix(".lock"), timeout=TIME_LIMIT):
        if _is_usable(path):
            return
        _refuse_failed(failure)
        for abandoned in path.parent.glob(f"{path.stem}.*.tmp"):  # by a process that was killed
            abandoned.unlink(missing_ok=True)
        _compile(path, compiler, sources, failure)


def _refuse_failed(failure: Path) -> None:
    if failure.exists() and time.time() - failure.stat().st_mtime < FAILURE_COUNTS_FOR:
        raise BuildError(
            f"the C++ compiler failed within the last hour: delete {failure}, which has its output, "
            "to try again now"
        )


def _compile(path: Path, compiler: list[str], sources: Sources, failure: Path) -> None:
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    command = [*compiler, *_arguments(sources, temporary)]
    _say(f"compiling C++ for PyTorch {torch.__version__}, once on this machine: 15 seconds to a minute")
    begin = time.monotonic()
    problem = _problem_of(command)
    seconds = f"{time.monotonic() - begin:.0f} s"
    if problem is None and not temporary.exists():
        problem = "it has written no file"
    if problem is None:
        _seal(temporary)
        os.replace(temporary, path)
        _say(f"compiled in {seconds}")
        return

    temporary.unlink(missing_ok=True)
    failure.write_text(f"{shlex.join(command)}\n{problem}\n", encoding="utf-8", errors="replace")
    _say(f"the C++ compiler failed after {seconds}, so layers run from Python, with the same results")
    raise BuildError(f"the C++ compiler failed: {failure} has its output")


def _problem_of(command: list[str]) -> str | None:
    """The output of a compiler that fails; None where it does not."""
    process = None
    try:
        # in a session of its own: a compiler is several processes, and all of them have to end
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        output, _ = process.communicate(timeout=TIME_LIMIT)
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"it was stopped after {TIME_LIMIT} seconds"
    finally:
        if process is not None:
            _end(process)
    return output if process.returncode else None


def _end(process: subprocess.Popen) -> None:
    """A compiler that still runs, with all that it has started."""
    with process:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _seal(path: Path) -> None:
    """End it with its checksum, which no loader looks at, and let nobody else write it."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())
    path.chmod(0o644)


def _say(text: str) -> None:
    """A whole line at once, as several processes may write; without a terminal nothing is said."""
    with contextlib.suppress(OSError, ValueError):
        print(f"mica: {text}", file=sys.stderr, flush=True)


def _compiler() -> list[str]:
    """The command, of which there may be several words in the environment variable CXX."""
    setting = os.environ.get("CXX", "")
    try:
        words = shlex.split(setting)
    except ValueError as error:
        raise BuildError(f"CXX={setting} is not a command ({error})") from error
    if words and shutil.which(words[0]) is None:
        raise BuildError(f"there is no compiler {words[0]}, which CXX names")
    if words:
        return words
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"there is no C++ compiler: neither {' nor '.join(COMPILERS)}, and CXX is not set")


def _identity(compiler: list[str]) -> str:
    """Of a command and the file that it runs, behind all links: that one fails says nothing of another."""
    program = os.path.realpath(shutil.which(compiler[0]))
    return hashlib.sha256("\0".join([program, *compiler]).encode()).hexdigest()[:8]


def _refuse_system() -> None:
    """What no compiler changes."""
    if platform.system() != "Linux":
        raise BuildError(f"the C++ has been tried on Linux only, not on {platform.system()}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("the C++ relies on the global interpreter lock, which this Python does not have")


def _includes() -> list[Path]:
    """Folders of headers: PyTorch's come with it, Python's perhaps not."""
    root = Path(torch.__file__).parent / "include"
    python = Path(sysconfig.get_path("include"))
    if not (root / "torch" / "csrc" / "autograd" / "python_variable.h").exists():
        raise BuildError(f"this PyTorch came without its headers, which would be in {root}")
    if not (python / "Python.h").exists():
        raise BuildError(f"there is no {python}/Python.h: the package python3-dev or python3-devel has it")
    return [root, root / "torch" / "csrc" / "api" / "include", python]


def _arguments(sources: Sources, output: Path) -> list[str]:
    arguments = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    for folder in _includes():
        arguments += ["-isystem", str(folder)]
    libraries = Path(torch.__file__).parent / "lib"
    arguments += [str(sources.folder / sources.files[0]), "-o", str(output), "-L", str(libraries)]
    arguments += [f"-l{library}" for library in LIBRARIES]
    return arguments


def _key(sources: Sources) -> str:
    """Everything that the compiled module depends on, after its name."""
    facts = [
        torch.__version__,
        str(torch.version.git_version),
        str(torch.compiled_with_cxx11_abi()),
        str(sysconfig.get_config_var("SOABI")),
        platform.machine(),
        *FLAGS,
    ]
    digest = hashlib.sha256("\0".join(facts).encode())
    for name in sources.files:
        source = sources.folder / name
        try:
            digest.update(source.read_bytes())
        except OSError as error:
            raise BuildError(f"{source} cannot be read ({error.strerror})") from error
    return f"{sources.name}-{digest.hexdigest()[:24]}"
