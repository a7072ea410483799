"""Kills ``mica adapt`` and ``mica transfer`` at random events and repeats them: is anything lost?

A trial is drawn from a number, which a failure names. A command, or two of them at once, is killed in a
folder and continued there, up to three times. In the end the weights must be those of the unbroken command,
to the bit, and the user's files must be what they were.
"""

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MICA_CACHE", "0")

from mica.cli import NOISY

for name in NOISY:  # what they log as they are imported is not about this
    logging.getLogger(name).setLevel(logging.ERROR)

import torch  # noqa: E402

from mica.cli.adapt import checkpoints  # noqa: E402
from tests.support.adapt_runs import saved  # noqa: E402
from tests.support.forked import Blow, Command  # noqa: E402
from tests.support.tiny_cli import TEXT, tiny_llama  # noqa: E402

ADAPT = "adapt --model=base --text=words.txt --steps=6 --save-steps=2 --rank=2 --sequence-length=16"
ADAPT += " --eval-blocks=2 --batch-size=2 --learning-rate=0.02"
TRANSFER = "transfer --adapter=whole --to=sibling"
RESULTS = {ADAPT: "adapter_model.safetensors", TRANSFER: "model.safetensors"}
LAST_WRITE = {ADAPT: 110, TRANSFER: 30}
KILLED = (-9, -15, 143)
FOLDERS = ("base", "sibling", "whole", "moved")


class Inputs:
    """Models, a text, and the results of commands that nothing befalls."""

    def __init__(self):
        self._made = tempfile.TemporaryDirectory(prefix="mica-kills-")
        self.folder = Path(self._made.name, "inputs")
        sibling = tiny_llama()
        for weight in sibling.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
        saved(tiny_llama(), self.folder / "base")
        saved(sibling, self.folder / "sibling")
        (self.folder / "words.txt").write_text(TEXT[:3000], encoding="utf-8")
        for command, output in ((ADAPT, "whole"), (TRANSFER, "moved")):
            unbroken = self.start([*command.split(), f"--output={output}"])
            if unbroken.end() != 0:
                raise AssertionError(unbroken.text())
        self.before = self.contents()

    def close(self) -> None:
        self._made.cleanup()

    def start(self, argv: list[str], blows: Sequence[Blow] = ()) -> Command:
        outside = Path(tempfile.mkdtemp(dir=self._made.name))
        return Command(argv, self.folder, outside / "log", outside / "cache", blows)

    def contents(self) -> dict[Path, bytes]:
        """Of the files that no command of a trial may change."""
        found = [path for name in FOLDERS for path in (self.folder / name).rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in (*found, self.folder / "words.txt")}

    def result(self, command: str) -> bytes:
        """The weights that ``command`` gives."""
        return self.before[self.folder / ("whole" if command == ADAPT else "moved") / RESULTS[command]]


class Trial:
    """Commands in one folder, ``kills`` of them killed. ``story`` says which, ``faults`` what was lost."""

    def __init__(self, number: int, inputs: Inputs, command: str | None = None):
        self.draw = random.Random(number)
        self.inputs = inputs
        self.output = inputs.folder / f"out-{number}"
        self.notes = self.output / "notes.txt"
        self.command = command or self.draw.choice([ADAPT, ADAPT, TRANSFER])
        self.kills = self.step = 0
        self.has_notes = False
        self.faults: list[str] = []
        self.story: list[str] = []

    def run(self) -> None:
        statuses = []
        for _ in range(self.draw.randint(1, 3)):
            statuses = self._do(self.draw.choice([1, 1, 2]), self._blow)
            if 0 in statuses:
                break
            if (self.output / "run.yaml").is_file():
                self.notes.write_text("mine", encoding="utf-8")
                self.has_notes = True
        if 0 not in statuses:
            self._do(1, tuple)
        self._check_end()
        shutil.rmtree(self.output, ignore_errors=True)

    def _blow(self) -> list[Blow]:
        what = self.draw.choice(["SIGKILL", "SIGKILL", "SIGTERM"])
        delay = self.draw.choice([0.0, 0.003, 0.02])
        if self.command == ADAPT and self.draw.random() < 0.3:
            return [Blow("step", self.draw.randint(1, 6), what, delay)]
        return [Blow("write", self.draw.randint(1, LAST_WRITE[self.command]), what, delay)]

    def _do(self, count: int, blow) -> list[int]:
        """``count`` commands at once, to their ends."""
        argv = [*self.command.split(), f"--output={self.output.name}"]
        is_resumed = (self.output / "run.yaml").is_file()
        if is_resumed:
            argv = ["adapt", "--resume", argv[-1]]
        started = [self.inputs.start(argv, blow()) for _ in range(count)]
        statuses = [each.end() for each in started]
        self.kills += sum(status in KILLED for status in statuses)
        for each, status in zip(started, statuses, strict=True):
            self.story.append(f"{' '.join(argv)}: {status}")
            # Refused beside another one, or where a killed transfer has written its weights
            may_be_refused = count > 1 or (self.output / RESULTS[TRANSFER]).is_file()
            expected = (0, *KILLED, 2) if may_be_refused else (0, *KILLED)
            if status not in expected:  # an error that nobody expects ends with 1
                self.faults.append(each.text())
        if statuses == [0, 0] and not is_resumed:
            self.faults.append("two new commands have written to one folder")
        latest = checkpoints.latest(self.output) if self.output.is_dir() else None
        step = checkpoints.step(latest) if latest else 0
        if step < self.step:
            self.faults.append(f"checkpoint-{self.step} is lost, the newest is {step}")
        self.step = step
        return statuses

    def _check_end(self) -> None:
        weights = self.output / RESULTS[self.command]
        if not weights.is_file() or weights.read_bytes() != self.inputs.result(self.command):
            self.faults.append(f"{weights.name} is not that of the unbroken command")
        if self.has_notes and not (self.notes.is_file() and self.notes.read_text() == "mine"):
            self.faults.append("notes.txt of the user has changed")
        if self.inputs.contents() != self.inputs.before:
            self.faults.append("a file of the user has changed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="at least so many [100]")
    parser.add_argument("--minutes", type=float, default=15, help="at most so long [15]")
    parser.add_argument("--trial", type=int, help="this one alone, with its story")
    args = parser.parse_args()
    inputs = Inputs()
    trials: list[Trial] = []
    end = time.monotonic() + 60 * args.minutes

    def work() -> None:
        while time.monotonic() < end and sum(trial.kills for trial in trials) < args.kills:
            number = random.randrange(2**31) if args.trial is None else args.trial
            trial = Trial(number, inputs)
            trial.run()
            trials.append(trial)
            if trial.faults or args.trial is not None:
                again = f"make kills ARGS='--trial {number}'"
                print("\n".join(["", again, *trial.story, *trial.faults]), flush=True)
            if args.trial is not None:
                return

    count = 1 if args.trial is not None else 2
    with ThreadPoolExecutor(count) as pool:
        for worker in [pool.submit(work) for _ in range(count)]:
            worker.result()
    inputs.close()
    failed = sum(bool(trial.faults) for trial in trials)
    print(f"{sum(trial.kills for trial in trials)} kills in {len(trials)} trials, {failed} with faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
