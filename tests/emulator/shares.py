"""What one process of ``make emulate`` runs: a part of the cases of one target."""

from __future__ import annotations

import argparse
import time
import traceback
import warnings
from dataclasses import dataclass, field

import torch
import triton

from tests.emulator import planned
from tests.emulator.cases import cases
from tests.emulator.driver import programs, statistics
from tests.emulator.judging import WrongError
from tests.emulator.program import FaultError


@dataclass
class Result:
    """What one process has run."""

    target: str
    counts: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)  # launches, programs and so on -> how many

    def finished(self) -> Result:
        self.totals = {**vars(statistics), "programs": len(programs), "s of CPU": time.process_time()}
        return self

    def add(self, kernel: str, label: str, function, may_be_refused: bool, verbose: bool) -> None:
        """Run a case and count it: as good, as refused for its size, or at fault."""
        start, outcome = time.process_time(), 0
        try:
            error = function()
            self.errors[kernel] = max(self.errors.get(kernel, 0.0), error)
            text = f"{error:.2f}"
        except triton.runtime.errors.OutOfResources as error:
            outcome, text = 1 if may_be_refused else 2, f"{error}"
        except Exception as error:
            outcome, text = 2, f"{type(error).__name__}: {error}"
            if not isinstance(error, WrongError | FaultError):
                text += "\n" + traceback.format_exc()
        self.counts.setdefault(kernel, [0, 0, 0])[outcome] += 1
        if outcome == 2:
            self.faults.append(f"{self.target} {label}: {text}")
        if verbose:
            kind = ("ok", "refused", "FAULT")[outcome]
            seconds = time.process_time() - start
            print(f"{kind} {self.target} {label}: {text} ({seconds:.1f} s of CPU)", flush=True)


def run(target: str, part: int, parts: int, args: argparse.Namespace) -> Result:
    """Every ``parts``-th case of one target."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    result = Result(target)
    chosen = [case for case in cases(target) if case.is_quick or args.all]
    chosen = [case for case in chosen if args.only in case.label][:: args.every]
    with planned.emulated(target):
        for number, case in enumerate(chosen):
            torch.manual_seed(number)
            if number % parts == part:
                result.add(case.kernel, case.label, case.run, case.is_foreign, args.verbose)
    return result.finished()
