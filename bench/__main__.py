"""``python -m bench``: run the suites, write results, tables and plots to ``bench/results/<machine>/``.

Each suite has a process of its own, so that none works in the memory, or with the threads, that another left.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

from bench import run
from bench.measure.machine import ROOT, output
from bench.results.schema import Result

SUITES = ROOT / "bench" / "suites"


def suites(selection: str, environment: dict[str, str]) -> list[str]:
    """The files of those that ``selection`` (``-k``) takes tests of."""
    files = sorted(file.name for file in SUITES.glob("bench_*.py"))
    if not selection:
        return files
    command = [*run.suite(files, selection), "--collect-only"]
    listing = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    return [file for file in files if f"{file}::" in listing]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="a look, 3 minutes")
    size.add_argument(
        "--full", dest="size", action="store_const", const="full", help="more shapes, much longer"
    )
    parser.add_argument("-k", default="", help="pytest expression: run only these")
    parser.add_argument("--name", help="of the result files (default: today, and -quick or -full)")
    parser.add_argument("--output", type=Path, help="folder (default: bench/results/<machine>, or $OUT)")
    args = parser.parse_args()
    size = args.size or "default"
    name = args.name or "-".join([str(date.today()), *([] if size == "default" else [size])])
    # Two thread pools that spin (OpenMP's of PyTorch, OpenBLAS's of SciPy) would take turns on the cores.
    environment = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"), "MICA_BENCH_SIZE": size}
    this = run.Run((args.output or output()) / f"{name}.json")
    this.machine["size"] = size
    failed = False
    for file in suites(args.k, {**os.environ, **environment}):
        print(file, flush=True)
        summary = this.start(run.Job(file, run.suite([file], args.k), environment))
        failed |= summary["state"] not in ("passed", run.NOTHING)  # some suites are for other machines
    result = Result.load(this.file) if this.file.exists() else None
    this.journal.unlink(missing_ok=True)
    if result is None or not (result.groups or result.refused):
        this.file.unlink(missing_ok=True)
        print("bench: nothing was timed", file=sys.stderr)
        return 1
    from bench.report.__main__ import write

    print(write(this.file))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
