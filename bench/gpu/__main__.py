"""``python -m bench.gpu``: on a machine with a CUDA GPU, is it correct there, and how fast?

Eight stages (`bench.gpu.stages`), the most telling first, each in a separate process under a watchdog, with a
summary line of JSON after each. If they may take longer than the budget, it first prints commands that each
fit. Results are written as they come: whatever ends the run, what was measured before is kept. Exit status: 0
all stages passed, 1 some did not, 2 there is nothing to run on.

``--dry-run`` does the same on a CPU, with interpreted kernels and tiny shapes. It shows that every stage
works; its times mean nothing, and its report says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import traceback
from datetime import date
from pathlib import Path

REQUIRED = ("torch", "triton", "peft", "transformers", "scipy", "threadpoolctl")
REQUIRED += ("pytest", "pytest_benchmark", "xdist")


def parser() -> argparse.ArgumentParser:
    options = {"prog": "python -m bench.gpu", "description": __doc__, "allow_abbrev": False}
    parser = argparse.ArgumentParser(**options, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="without a GPU: interpreted kernels, tiny shapes")
    add("--stages", default="", metavar="1,3,5", help="only these (default: all)")
    add("--budget", type=float, default=540.0, metavar="SECONDS", help="in total (default 540)")
    silence = "a stage that has begun and then reports nothing for so long is restarted without what it was "
    silence += "doing (default 75: a build by torch.compile takes longest)"
    add("--silence", type=float, default=75.0, metavar="SECONDS", help=silence)
    add("--name", default=f"{date.today()}-gpu", help="of the result files")
    add("--output", type=Path, help="folder (default: $OUT, or bench/results/<device>)")
    return parser


def commands(budget: float, name: str) -> str:
    """That run all stages, each within the default budget; "" if this budget is enough for all."""
    from bench.gpu.stages import COMMANDS, STAGES

    if budget >= sum(stage.seconds for stage in STAGES):
        return ""
    parts = enumerate(COMMANDS, 1)
    lines = [f"  python -m bench.gpu --stages {stages} --name {name}-{part}" for part, stages in parts]
    return "\n".join(["All stages may take longer than this budget. Each of these fits ten minutes:", *lines])


def report(file: Path, with_pictures: bool = True) -> str:
    """Written next to the results. An error in it must not end the run: it can be made again."""
    again = f"python -m bench.report {file} makes it"
    try:
        from bench.report.__main__ import write

        return write(file, with_pictures)
    except ImportError as error:  # pandas, or what it makes tables with: the machine need not have them
        return f"there is no report, since {error.name or error} is not installed here: {again}"
    except Exception:
        return f"there is no report: {traceback.format_exc()}{again}"


def main(argv: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"bench.gpu needs {', '.join(missing)}, which cannot be imported here", file=sys.stderr)
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
    from bench.run import Run

    known = {str(number): stage for number, stage in enumerate(STAGES, 1)}
    chosen = [one.strip() for one in args.stages.split(",") if one.strip()] or list(known)
    if unknown := [one for one in chosen if one not in known]:
        command.error(f"--stages: {', '.join(unknown)} is not one of {', '.join(known)}")
    if not (args.stages or args.dry_run) and (split := commands(args.budget, args.name)):
        print(split, flush=True)
    folder = args.output or output("dry-run" if args.dry_run else None)
    run = Run(folder / f"{args.name}.json")
    folder = run.file.parent
    print(json.dumps(run.machine), flush=True)
    deadline, all_passed = time.monotonic() + args.budget, True
    for stage in map(known.get, chosen):
        left = deadline - time.monotonic()
        if left <= 0:
            summary = run.leave_out(stage.name, "the budget is spent")
        else:
            summary = run.start(job(stage, folder, args.name, args.dry_run, left, args.silence))
        print(f"\nSTAGE {json.dumps(summary)}", flush=True)  # a killed pytest leaves half a line
        all_passed &= summary["state"] == "passed"
        report(run.file, with_pictures=False)
    run.journal.unlink()  # the result file has all of it
    print(report(run.file))
    if rows := table(Result.load(run.file)):
        print(f"what FORMS of kernels/configs.py would hold:\n{rows}")
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
