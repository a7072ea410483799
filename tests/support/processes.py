"""Programs in processes of their own, such as the benchmarks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Variables of this test run, e.g. those of pytest-xdist's workers, in which pytest-benchmark times nothing
OURS = ("PYTEST_", "TRITON_INTERPRET", "MICA_BENCH_", "MICA_BACKEND")


def outside() -> dict[str, str]:
    """The environment without the variables of this test run."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)}


def printed_by(code: str, *arguments: object, cwd: Path | None = None, **environment: str) -> str:
    """What a program in Python prints, which runs to its end in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(*arguments: object, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """``python -m`` with these arguments in the checkout's root, and to its end.

    ``path``: a folder of further modules.
    """
    own = {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (ROOT, path))))}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=outside() | own | environment, capture_output=True, text=True
    )
