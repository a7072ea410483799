"""The tester for any length of time (``make fuzz``): random sequences of actions, a new seed each round."""

from __future__ import annotations

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
os.environ.setdefault("MICA_TUNE_FILE", "no such folder/tuning.json")
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.fuzz_machine import KINDS, machine, tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="one round with this seed: a failure again")
    parser.add_argument("--kind", choices=KINDS, help="only models of this kind")
    parser.add_argument("--groups", action="store_true", help="with group_projections=True from the start")
    parser.add_argument("--examples", type=int, default=20, help="sequences a round")
    parser.add_argument("--steps", type=int, default=25, help="actions a sequence")
    parser.add_argument("--no-shrink", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # with it, NaN in every torch.empty
    warnings.simplefilter("ignore")
    attributes = {"KIND_NAMES": [args.kind]} if args.kind else {}
    variant = machine("Fuzzed", **attributes, GROUPS=True if args.groups else "auto")
    phases = [Phase.generate] if args.no_shrink else [Phase.generate, Phase.shrink]
    options = settings(
        max_examples=args.examples,
        stateful_step_count=args.steps,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    end, failed, rounds = time.monotonic() + 60 * args.minutes, [], 0
    while args.seed is not None or time.monotonic() < end:
        number = random.randrange(2**31) if args.seed is None else args.seed
        rounds += 1
        try:
            run_state_machine_as_test(seed(number)(type("Fuzzed", (variant,), {})), settings=options)
        except Exception:
            traceback.print_exc()
            kind = f" --kind {args.kind}" if args.kind else ""
            groups = " --groups" if args.groups else ""
            print(
                f"again: make fuzz ARGS='--seed {number} --examples {args.examples} --steps {args.steps}"
                f"{kind}{groups}'",
                flush=True,
            )
            failed.append(number)
        if args.seed is not None:
            break
    print(tally())
    print(f"{rounds} rounds of {args.examples} sequences, {len(failed)} failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
