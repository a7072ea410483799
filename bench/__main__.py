"""``python -m bench``: run the suites, write results, tables and plots to ``bench/results/<machine>/``.

Each suite runs in a separate process, so that none inherits another's memory or threads.
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
from bench.report.__main__ import write
from bench.results.schema import Result

# Seconds. The longest test, stock PEFT's initialisation, takes a minute on two cores.
SILENCE = 900.0


def suites(selection: str, environment: dict[str, str]) -> list[str]:
    """The files in which ``selection`` (``-k``) selects tests."""
    files = sorted(file.name for file in run.SUITES.glob("bench_*.py"))
    if not selection:
        return files
    command = [*run.suite(files, selection), "--collect-only"]
    listing = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    return [file for file in files if f"{file}::" in listing]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    for size, text in (("quick", "3 minutes"), ("full", "more shapes, much longer")):
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size, help=text)
    parser.set_defaults(size="default")
    parser.add_argument("-k", default="", help="pytest expression: run only these")
    parser.add_argument("--name", help="of the result files (default: today, and -quick or -full)")
    parser.add_argument("--output", type=Path, help="folder (default: bench/results/<machine>, or $OUT)")
    args = parser.parse_args()
    name = args.name or f"{date.today()}{'' if args.size == 'default' else f'-{args.size}'}"
    environment = {"MICA_BENCH_SIZE": args.size}
    this = run.Run((args.output or output()) / f"{name}.json")
    this.machine["size"] = args.size
    failed = False
    for file in suites(args.k, {**os.environ, **environment}):
        print(file, flush=True)
        summary = this.start(run.Job(file, run.suite([file], args.k), environment, silence=SILENCE))
        failed |= summary["state"] not in ("passed", run.NOTHING)  # some suites are for other machines
    result = Result.load(this.file) if this.file.exists() else None
    this.journal.unlink(missing_ok=True)
    if result is None or not (result.groups or result.refused):
        this.file.unlink(missing_ok=True)
        print("bench: nothing was timed", file=sys.stderr)
        return 1
    print(write(this.file))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
