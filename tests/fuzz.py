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

from tests.support.fuzz_folders import Folders
from tests.support.fuzz_machine import KINDS, machine, options, tally
from tests.support.fuzz_runs import Runs

COMMANDS = {"adapt": Runs, "folders": Folders}  # kinds that are no models: whole commands, a second each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="one round with this seed: a failure again")
    parser.add_argument("--kind", choices=[*KINDS, *COMMANDS], help="only models of this kind, or commands")
    parser.add_argument("--examples", type=int, help="sequences a round [20; of commands: 4]")
    parser.add_argument("--steps", type=int, help="actions a sequence [25; of commands: 4]")
    parser.add_argument("--no-shrink", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # with it, NaN in every torch.empty
    warnings.simplefilter("ignore")
    models = machine("Fuzzed", **({"KIND_NAMES": [args.kind]} if args.kind in KINDS else {}))
    begin, failed, rounds = time.monotonic(), [], 0
    spent = {"models": 0.0, **dict.fromkeys(COMMANDS, 0.0)}
    while args.seed is not None or time.monotonic() < begin + 60 * args.minutes:
        number = random.randrange(2**31) if args.seed is None else args.seed
        rounds += 1
        kind = args.kind or _next(spent)
        is_command = kind in COMMANDS
        examples = args.examples or (4 if is_command else 20)
        steps = args.steps or (4 if is_command else 25)
        chosen = options(examples, steps, shrinks=not (args.no_shrink or is_command))
        start = time.monotonic()
        fuzzed = type("Fuzzed", (COMMANDS.get(kind, models),), {})
        try:
            run_state_machine_as_test(seed(number)(fuzzed), settings=chosen)
        except Exception:
            traceback.print_exc()
            again = "" if kind == "models" else f" --kind {kind}"
            sizes = f"--examples {examples} --steps {steps}"
            print(f"again: make fuzz ARGS='--seed {number} {sizes}{again}'", flush=True)
            failed.append(number)
        spent[kind if is_command else "models"] += time.monotonic() - start
        if args.seed is not None:
            break
    print(tally())
    print(f"{rounds} rounds, {len(failed)} failed: {failed}")
    return 1 if failed else 0


def _next(spent: dict[str, float]) -> str:
    """Models for most of the time, and a fifth of it for each kind of commands."""
    for kind in COMMANDS:
        if 3 * spent[kind] < spent["models"]:
            return kind
    return "models"


if __name__ == "__main__":
    sys.exit(main())
