"""Kills of commands that share a folder, of first commands and of ``transfer``: is anything lost?

Each trial is drawn from a number, which a failure names. Its commands are killed by SIGKILL or SIGTERM at
random events and moments. Afterwards files are compared by content, and what was begun is resumed.
"""

import argparse
import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MICA_CACHE", "0")

from mica.cli import NOISY

for name in NOISY:  # what they log as they are imported is not about this
    logging.getLogger(name).setLevel(logging.ERROR)

from tests.fuzz import folder_trials  # noqa: E402
from tests.fuzz.folder_templates import Templates  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="at least so many [100]")
    parser.add_argument("--minutes", type=float, default=15, help="at most so long [15]")
    parser.add_argument("--seed", type=int, help="of the campaign; the same trials again")
    parser.add_argument("--trial", type=int, action="append", help="this trial alone, with its story")
    parser.add_argument("--scene", choices=list(folder_trials.SCENES), action="append", default=[])
    parser.add_argument("--processes", type=int, default=2, help="trials at once [2]")
    args = parser.parse_args()
    seed = random.randrange(2**31) if args.seed is None else args.seed
    campaign = Campaign(seed, args)
    try:
        return campaign.run()
    finally:
        campaign.templates.close()


class Campaign:
    """Trials by several threads, each of which waits for the processes that it has started."""

    def __init__(self, seed: int, args: argparse.Namespace):
        self.args = args
        self.seed = seed
        self.draw = random.Random(seed)
        self.lock = threading.Lock()
        self.kills, self.faults, self.scenes = Counter(), Counter(), Counter()
        self.commands = 0
        self.failed: list[tuple[int, str]] = []
        self.begin = time.monotonic()
        self.templates = Templates()

    def run(self) -> int:
        with ThreadPoolExecutor(self.args.processes) as pool:
            workers = [pool.submit(self._work) for _ in range(self.args.processes)]
            for worker in workers:
                worker.result()
        self._report()
        return 1 if self.faults else 0

    def _work(self) -> None:
        while (number := self._next()) is not None:
            trial = folder_trials.run(number, self.templates, self.args.scene)
            with self.lock:
                self._add(number, trial)

    def _next(self) -> int | None:
        with self.lock:
            if self.args.trial is not None:
                return self.args.trial.pop() if self.args.trial else None
            is_late = time.monotonic() > self.begin + 60 * self.args.minutes
            if is_late or self.kills.total() >= self.args.kills:
                return None
            return self.draw.randrange(2**31)

    def _add(self, number: int, trial: folder_trials.Trial) -> None:
        self.kills += trial.kills
        self.commands += trial.commands
        self.scenes[trial.scene] += 1
        for fault in trial.faults:
            self.faults[f"{trial.scene}: {fault.kind}"] += 1
        if trial.faults:
            self.failed.append((number, trial.scene))
        if trial.faults or self.args.trial is not None:
            again = f"make kills ARGS='--trial {number} --scene \"{trial.scene}\"'"
            print(f"\n{again}\n" + "\n".join(trial.story), flush=True)

    def _report(self) -> None:
        minutes = (time.monotonic() - self.begin) / 60
        print(f"\n{self.commands} commands in {self.scenes.total()} scenes: {_told(self.scenes)}")
        print(f"{self.kills.total()} kills in {minutes:.1f} minutes: {_told(self.kills)}")
        print(f"{len(self.failed)} scenes with faults: {_told(self.faults) or 'none'}")
        if self.failed:
            print(f"trials: {' '.join(str(number) for number, _ in self.failed)}")
        if self.args.trial is None:
            print(f"the same trials again: make kills ARGS='--seed {self.seed} --kills {self.args.kills}'")


def _told(counts: Counter) -> str:
    return "; ".join(f"{what} {count}" for what, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())
