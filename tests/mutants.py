"""The mutation check (``make mutants``): small wrong edits, each of which must turn the tests red.

Every edit is made in a copy of the tree of its own, and the tests that mirror the edited file run there until
the first failure. An edit that stays green is a hole in the tests; one whose place is gone has to be renewed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.mutants import MUTANTS
from tests.support.mutants.edits import Mutant

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("kernels", "mica", "tests", "bench", "pyproject.toml")
TIMEOUT = 300  # seconds: a mutant may loop


def run(mutant: Mutant) -> tuple[str, float]:
    """("red", "GREEN" or what is wrong with the entry, seconds)."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "results")
                shutil.copytree(source, tree / name, symlinks=True, ignore=ignored)
            else:
                shutil.copy(source, tree / name)
        file = tree / mutant.file
        try:
            file.write_text(mutant.applied(file.read_text()))
        except (LookupError, OSError) as error:
            return str(error), 0.0
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *mutant.tests]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        try:
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return "red", time.monotonic() - start
    # 1: tests failed; 2: an import failed; below 0: it crashed, as an access far outside does. Anything else
    # (no tests, a usage error) proves nothing.
    if done.returncode in (1, 2) or done.returncode < 0:
        state = "red"
    else:
        state = "GREEN" if done.returncode == 0 else f"pytest exits with {done.returncode}"
    return state, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose file, function or edit contains one")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.words or any(w in " ".join(m[:4]) for w in args.words)]
    bad = []
    with ThreadPoolExecutor(args.processes) as pool:
        for mutant, (state, seconds) in zip(chosen, pool.map(run, chosen), strict=True):
            edit = " -> ".join(" ".join(text.split()) or "nothing" for text in (mutant.old, mutant.new))
            print(f"{state:6} {seconds:4.0f} s  {mutant.file}: {mutant.function}: {edit[:100]}", flush=True)
            if state != "red":
                bad.append(mutant)
    print(f"{len(chosen)} mutants, {len(chosen) - len(bad)} red, {len(bad)} not")
    return 1 if bad or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
