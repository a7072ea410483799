"""``python -m bench.gpu``: on a machine with a CUDA GPU, is it correct there, and how fast?

Eight stages (`bench.gpu.stages`), the most telling first, each in a separate process under a watchdog, with a
summary line of JSON after each. Results are written as they come: whatever ends the run, what was measured
before is kept. Exit status: 0 all stages passed, 1 some did not, 2 there is nothing to run on.

``--dry-run`` does the same on a CPU, with interpreted kernels and tiny shapes. It shows that every stage
works; its times mean nothing, and its report says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import time
from datetime import date
from pathlib import Path

REQUIRED = (
    "torch",
    "triton",
    "peft",
    "transformers",
    "scipy",
    "threadpoolctl",
    "pytest",
    "pytest_benchmark",
    "xdist",
)
PEFT = (0, 20)  # the first version that has MiCA
BUDGET = 540.0  # seconds
DRY_BUDGET = 3000.0  # every stage of a dry run ends, on a busy machine too


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dry-run", action="store_true", help="without a GPU: interpreted kernels, tiny shapes")
    add(
        "--stages",
        default="",
        metavar="1,3,5",
        help="only these (default: all); 1,3,4,7 and 2,5,6,8 each end within the default budget",
    )
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"in total (default {BUDGET:.0f}, of a dry run {DRY_BUDGET:.0f})",
    )
    add(
        "--silence",
        type=float,
        default=75.0,
        metavar="SECONDS",
        help="a stage that has begun and then reports nothing for so long is restarted without what it was "
        "doing (default 75: a build by torch.compile takes longest)",
    )
    add("--name", default=f"{date.today()}-gpu", help="of the result files")
    add("--output", type=Path, help="folder (default: $OUT, or bench/results/<device>)")
    return parser


def report(file: Path) -> str:
    """Written next to the results, if this machine has what it takes: pandas, seaborn and tabulate."""
    try:
        from bench.report.__main__ import write

        return write(file)
    except ImportError as error:
        return f"{error.name} is not installed here: python -m bench.report {file} makes the report"


def what_is_missing() -> str | None:
    """A sentence on the libraries that a run needs and this machine lacks."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        return f"bench.gpu needs {', '.join(missing)}, which cannot be imported here"
    found = importlib.metadata.version("peft")
    major, minor, *_ = found.split(".")
    if (int(major), int(minor)) < PEFT:
        return f"bench.gpu needs PEFT {PEFT[0]}.{PEFT[1]} or later, which has MiCA, but here is {found}"
    return None


def main(argv: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    why = what_is_missing()
    if why is not None:
        print(why, file=sys.stderr)
        return 2
    if args.dry_run:
        os.environ["MICA_BENCH_SIZE"] = "dry"
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print(
            "bench.gpu needs a CUDA GPU, and torch sees none here (--dry-run goes without)", file=sys.stderr
        )
        return 2

    from bench.gpu.forms import table
    from bench.gpu.stages import STAGES, job
    from bench.measure.machine import output
    from bench.results.schema import Result
    from bench.run import CUT_OFF, Run

    known = {str(number): stage for number, stage in enumerate(STAGES, 1)}
    chosen = [one.strip() for one in args.stages.split(",") if one.strip()] or list(known)
    unknown = [one for one in chosen if one not in known]
    if unknown:
        command.error(f"--stages: {', '.join(unknown)} is not one of {', '.join(known)}")
    run = Run((args.output or output("dry-run" if args.dry_run else None)) / f"{args.name}.json")
    print(json.dumps(run.machine), flush=True)
    budget = args.budget or (DRY_BUDGET if args.dry_run else BUDGET)
    deadline = time.monotonic() + budget
    states = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which `timeout` sends
    try:
        for number in chosen:
            stage = known[number]
            left = deadline - time.monotonic()
            if left <= 0:
                summary = run.leave_out(stage.name, "the budget is spent")
            else:
                summary = run.start(job(stage, run.file, args.dry_run, left, args.silence))
            print(f"\nSTAGE {json.dumps(summary)}", flush=True)  # a killed pytest leaves half a line
            states.append(summary["state"])
    except KeyboardInterrupt:  # what has been measured by now is in the result
        print(f"\nThe run was {CUT_OFF}.", flush=True)
        states.append(CUT_OFF)
    run.journal.unlink()  # the result file has all of it
    print(report(run.file))
    rows = table(Result.load(run.file))
    if rows:
        print(f"what FORMS of kernels/configs.py would hold:\n{rows}")
    return 0 if set(states) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
