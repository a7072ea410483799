"""``python -m bench.gpu``: on a machine with a CUDA GPU, is it correct there, and how fast?

Seven stages (`bench.gpu.stages`), the most telling first, each in a separate process under a watchdog, with a
summary line of JSON after each. Results are written as they come: whatever ends the run, what was measured
before is kept. Exit status: 0 all stages passed, 1 some did not, 2 there is nothing to run on.

``--dry-run`` does the same on a CPU, with interpreted kernels and tiny shapes. It shows that every stage
works; its times mean nothing, and its report says so.

``--adopt FILE`` runs nothing: it brings the figures of a run's result, or of the journal of a run that was
cut off, to the pages (`bench.gpu.adopt`). It needs no GPU.
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
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.gpu.stages import Stage
    from bench.run import Run

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
    add("--name", help=f"of the result files (default: {date.today()}-gpu, and the stages if not all)")
    add("--output", type=Path, help="folder (default: $OUT, or bench/results/<device>)")
    add(
        "--adopt",
        type=Path,
        metavar="FILE",
        help="run nothing: write the pages from this .json or .jsonl",
    )
    return parser


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


def adopt(file: Path) -> int:
    """``--adopt``: what has been written, or why nothing was."""
    try:
        from bench.gpu import adopt
        from bench.report.__main__ import write
    except ImportError as error:
        print(f"bench.gpu --adopt needs {error.name}, which cannot be imported here", file=sys.stderr)
        return 2
    try:
        copied = adopt.adopt(file)
    except adopt.RefusedError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    write(copied)
    print(f"{copied} and the pages are written: look at git diff, run make test, and commit.")
    return 0


def chosen_forms(folder: Path) -> Iterator[str]:
    """A line for each layer whose form the device has chosen in this run, and by how much it is faster."""
    import torch

    from bench.measure.machine import DEVICE
    from mica.paths import tuning

    os.environ["MICA_TUNE"] = str(folder)
    for kind, layer in tuning.table(torch.device(DEVICE, 0)).stored.items():
        yield f"{kind}: forward {layer.forward.found()}; backward {layer.backward.found()}"


def run_stages(run: Run, stages: Sequence[Stage], is_dry: bool, budget: float, silence: float) -> list[str]:
    """How each of them ended. A signal to end is the last one's state: what was measured is in the result."""
    from bench.gpu.stages import job
    from bench.run import CUT_OFF

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which `timeout` sends
    deadline = time.monotonic() + budget
    states = []
    try:
        run.save()
        for stage in stages:
            left = deadline - time.monotonic()
            if left <= 0:
                ended = run.leave_out(stage.name, "the budget is spent")
            else:
                ended = run.start(job(stage, run.file, is_dry, left, silence))
            print(f"\nSTAGE {json.dumps(ended)}", flush=True)  # a killed pytest leaves half a line
            states.append(ended["state"])
    except KeyboardInterrupt:
        print(f"\nThe run was {CUT_OFF}.", flush=True)
        states.append(CUT_OFF)
    return states


def main(argv: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    if args.adopt:
        return adopt(args.adopt)
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

    from bench.gpu.stages import STAGES
    from bench.measure.machine import output
    from bench.report.__main__ import write
    from bench.results import journal
    from bench.run import Run

    known = {str(number): stage for number, stage in enumerate(STAGES, 1)}
    chosen = [one.strip() for one in args.stages.split(",") if one.strip()] or list(known)
    unknown = [one for one in chosen if one not in known]
    if unknown:
        command.error(f"--stages: {', '.join(unknown)} is not one of {', '.join(known)}")
    name = f"{date.today()}-gpu"
    if chosen != [*known]:  # runs of different stages on one day do not replace each other's results
        name = "-".join([name, "stages", *chosen])
    run = Run((args.output or output("dry-run" if args.dry_run else None)) / f"{args.name or name}.json")
    print(json.dumps(run.machine), flush=True)
    journal.write("machine", facts=run.machine)
    budget = args.budget
    if budget is None:
        budget = DRY_BUDGET if args.dry_run else BUDGET
    states = run_stages(run, [known[number] for number in chosen], args.dry_run, budget, args.silence)
    run.journal.unlink()  # the result file has all of it
    print(write(run.file))
    for line in chosen_forms(run.file.parent):
        print(line)
    if not args.dry_run:
        print(f"to make this part of the checkout: python -m bench.gpu --adopt {run.file}")
    return 0 if set(states) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
