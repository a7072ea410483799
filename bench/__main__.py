"""``python -m bench``: run the suites, write the result and its report to ``bench/results/<machine>/``.

Each suite runs in a separate process, so that none inherits another's memory or threads, and one that hangs
or dies is restarted without the cause.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

from bench import run
from bench.measure.machine import output
from bench.report.__main__ import write
from bench.results.schema import Result

# Seconds. The longest test, stock PEFT's initialisation, takes a minute on two cores.
SILENCE = 900.0


def main() -> int:
    suites = sorted(file.stem.removeprefix("bench_") for file in run.SUITES.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(suites)} (default: all)")
    parser.add_argument("-k", default="", help="pytest expression: run only these")
    parser.add_argument("--name", default=str(date.today()), help="of the result files (default: today)")
    parser.add_argument("--output", type=Path, help="folder (default: bench/results/<machine>, or $OUT)")
    args = parser.parse_args()
    for name in args.suites:
        if name not in suites:
            parser.error(f"there is no suite {name!r}: give some of {', '.join(suites)}")
    this = run.Run((args.output or output()) / f"{args.name}.json")
    failed = False
    for name in args.suites or suites:
        print(name, flush=True)
        command = run.suite([f"bench_{name}.py"], "-k", args.k)
        summary = this.start(run.Job(name, command, {}, silence=SILENCE))
        failed |= summary["state"] not in ("passed", run.NOTHING)  # some suites are for other machines
    result = Result.load(this.file)
    this.journal.unlink()
    if not (result.groups or result.refused):
        this.file.unlink()
        print("bench: nothing was timed", file=sys.stderr)
        return 1
    print(write(this.file))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
