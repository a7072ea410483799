"""Starts the benchmarks in separate processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Variables of this test run, e.g. those of pytest-xdist's workers, in which pytest-benchmark times nothing
OURS = ("PYTEST_", "TRITON_INTERPRET", "MICA_BENCH_", "MICA_BACKEND")


def start(
    *arguments: object, plugin: str = "", path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """``python -m`` with these arguments in the checkout's root, without the variables of this test run.

    ``plugin``: for every pytest that it starts; ``path``: a folder of further modules.
    """
    outside = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    outside["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (ROOT, path))))
    if plugin:
        outside["PYTEST_ADDOPTS"] = f"-p {plugin}"
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=outside | environment, capture_output=True, text=True)
