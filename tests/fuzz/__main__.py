"""The tester for any length of time (``make fuzz``): random sequences of actions, a new seed each round.

Rounds of two parts take turns, by the time that each has had: models (with the backend, and their twins with
stock PEFT), and ``mica adapt``.
"""

import argparse
import os
import random
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MICA_CACHE", "0")
import torch
from hypothesis import seed
from hypothesis.stateful import run_state_machine_as_test

from mica.ops import recompute
from tests.fuzz.machine import Machine, options
from tests.fuzz.models import KINDS
from tests.fuzz.runs import Runs


class Part(NamedTuple):
    machine: type
    share: float  # of the time
    examples: int  # sequences a round
    steps: int  # actions a sequence
    shrinks: bool = True  # a failure to the shortest sequence that fails


PARTS = {
    "models": Part(Machine, 0.7, 20, 25),
    "adapt": Part(Runs, 0.3, 4, 4, shrinks=False),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    limit = "no round begins later [10]"
    parser.add_argument("--minutes", type=float, default=10, help=limit)
    again = "a round with each of these seeds, whatever the time: a failure again"
    parser.add_argument("--seed", type=int, nargs="+", help=again)
    parser.add_argument(
        "--processes", type=int, default=1, help="so many at once, each with seeds of its own [1]"
    )
    parser.add_argument("--kind", choices=[*KINDS, *PARTS], help="one part, or only models of this kind")
    parser.add_argument("--examples", type=int, help="sequences a round")
    parser.add_argument("--steps", type=int, help="actions a sequence")
    parser.add_argument("--no-shrink", action="store_true")
    return parser.parse_args()


def seeds(args: argparse.Namespace) -> Iterator[int]:
    if args.seed is not None:
        yield from args.seed
        return
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        yield random.randrange(2**31)


def next_part(args: argparse.Namespace, spent: Counter) -> str:
    """The part that is given, or the one that has had the least of its share."""
    if args.kind in PARTS:
        return args.kind
    if args.kind is not None or args.seed is not None:
        return "models"
    return min(PARTS, key=lambda name: spent[name] / PARTS[name].share)


def play(args: argparse.Namespace, name: str, number: int) -> str | None:
    """One round. Returns the command that runs it again if it has failed, after its traceback."""
    part = PARTS[name]
    examples, steps = args.examples or part.examples, args.steps or part.steps
    attributes = {"KIND_NAMES": [args.kind]} if args.kind in KINDS else {}
    fuzzed = type("Fuzzed", (part.machine,), attributes)
    chosen = options(examples, steps, shrinks=part.shrinks and not args.no_shrink)
    try:
        run_state_machine_as_test(seed(number)(fuzzed), settings=chosen)
    except Exception:
        traceback.print_exc()
    else:
        return None
    kind = args.kind or (name if name != "models" else None)
    words = f"--seed {number} --examples {examples} --steps {steps}" + (f" --kind {kind}" if kind else "")
    command = f"make fuzz ARGS='{words}'"
    print(f"again: {command}", flush=True)
    return command


def in_this_process(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # with it, NaN in every torch.empty
    warnings.simplefilter("ignore")
    recompute.MIN_NUMBERS = 0  # the models are
    failed, spent, start = [], Counter(), time.monotonic()
    for number in seeds(args):
        name, began = next_part(args, spent), time.monotonic()
        command = play(args, name, number)
        failed += [command] if command else []
        spent[name] += time.monotonic() - began
    minutes = (time.monotonic() - start) / 60
    print("\n".join([f"in {minutes:.1f} minutes, {len(failed)} rounds failed", *failed]), flush=True)
    return 1 if failed else 0


def main() -> int:
    args = arguments()
    if args.processes == 1 or args.seed is not None:
        return in_this_process(args)
    one = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:], "--processes", "1"]
    started = [subprocess.Popen(one) for _ in range(args.processes)]
    return max(abs(process.wait()) for process in started)


if __name__ == "__main__":
    sys.exit(main())
