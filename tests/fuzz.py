"""The tester for any length of time (``make fuzz``): random sequences of actions, a new seed each round."""

import argparse
import os
import random
import sys
import time
import traceback
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MICA_CACHE", "0")
os.environ.setdefault("TRITON_INTERPRET", "1")
import torch
from hypothesis import seed
from hypothesis.stateful import run_state_machine_as_test

from tests.support.fuzz_machine import KINDS, machine, options, tally
from tests.support.fuzz_runs import Runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="one round with this seed: a failure again")
    parser.add_argument("--kind", choices=[*KINDS, "adapt"], help="only models of this kind, or `mica adapt`")
    parser.add_argument("--examples", type=int, help="sequences a round [20; of mica adapt: 4]")
    parser.add_argument("--steps", type=int, help="actions a sequence [25; of mica adapt: 4]")
    parser.add_argument("--no-shrink", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # with it, NaN in every torch.empty
    warnings.simplefilter("ignore")
    attributes = {"KIND_NAMES": [args.kind]} if args.kind else {}
    models = machine("Fuzzed", **attributes)
    begin, failed, rounds = time.monotonic(), [], 0
    spent = {"adapt": 0.0, "models": 0.0}
    while args.seed is not None or time.monotonic() < begin + 60 * args.minutes:
        number = random.randrange(2**31) if args.seed is None else args.seed
        rounds += 1
        is_run = args.kind == "adapt" or (args.kind is None and 3 * spent["adapt"] < spent["models"])
        examples, steps = args.examples or (4 if is_run else 20), args.steps or (4 if is_run else 25)
        chosen = options(examples, steps, shrinks=not (args.no_shrink or is_run))
        start, fuzzed = time.monotonic(), type("Fuzzed", (Runs if is_run else models,), {})
        try:
            run_state_machine_as_test(seed(number)(fuzzed), settings=chosen)
        except Exception:
            traceback.print_exc()
            kind = " --kind adapt" if is_run else f" --kind {args.kind}" if args.kind else ""
            sizes = f"--examples {examples} --steps {steps}"
            print(f"again: make fuzz ARGS='--seed {number} {sizes}{kind}'", flush=True)
            failed.append(number)
        spent["adapt" if is_run else "models"] += time.monotonic() - start
        if args.seed is not None:
            break
    print(tally())
    print(f"{rounds} rounds, {len(failed)} failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
