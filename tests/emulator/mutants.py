"""The kernels with one synchronisation taken out of their PTX: each must be noticed (``python -m``).

A row is a case and an instruction, every occurrence of which is taken out, one at a time. ``spare``: how many
of them nothing depends on in this case.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

os.environ |= {"MICA_CACHE": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch

from mica.kernels.configs import Config
from tests.emulator import planned
from tests.emulator.cases import TARGETS, Case
from tests.emulator.changes import changed, found
from tests.emulator.driver import programs, settings
from tests.emulator.judging import WrongError
from tests.emulator.program import FaultError, Program

CASES = {
    "down": ("down_projection", {"tokens": 40, "width": 512, "rank": 128}),
    "down, split": ("down_projection", {"tokens": 20, "width": 600, "rank": 6}),
    "up": ("up_projection", {"tokens": 70, "width": 136, "rank": 24}),
    "grad_a": ("grad_a", {"tokens": 300, "width": 128, "rank": 128}),
    "x first": ("grad_a", {"tokens": 300, "width": 128, "rank": 16, "config": Config(64, 0, 128, 4, 4)}),
    "down of experts": ("down of experts", {"width": 136, "rank": 20}),
    "up of experts": ("up of experts", {"width": 136, "rank": 20}),
    "fused": ("fused_linear", {"tokens": 70, "width": 256, "rank": 24, "out_features": 128}),
}


class Row(NamedTuple):
    target: str
    case: str
    op: str
    spare: int = 0


ROWS = [
    Row("sm_80", "down", "cp.async.wait_group", 3),  # the loop waits again for what it has waited for
    Row("sm_80", "down", "cp.async.commit_group", 1),  # two groups become one, which is waited for as a whole
    Row("sm_80", "down", "bar.sync", 1),  # the loop waits again
    Row("sm_80", "down, split", "bar.sync", 2),  # two stand before the atomic, either is enough
    Row("sm_80", "down, split", "atom"),
    Row("sm_80", "up", "bar.sync", 1),  # before a store to a buffer that lies apart
    Row("sm_80", "grad_a", "cp.async.wait_group"),
    Row("sm_80", "grad_a", "bar.sync", 1),  # another of the loop orders the same accesses
    Row("sm_80", "down of experts", "bar.sync"),
    Row("sm_80", "up of experts", "bar.sync"),
    Row("sm_80", "fused", "cp.async.wait_group", 4),  # the loop waits again; nothing is left after it
    Row("sm_80", "fused", "bar.sync", 1),  # the loop waits again
    Row("sm_90", "x first", "cp.async.wait_group"),
    Row("sm_90", "x first", "wgmma.wait_group"),
    Row("sm_90", "x first", "wgmma.commit_group"),
    Row("sm_90", "x first", "wgmma.fence"),
    Row("sm_90", "x first", "fence.proxy.async"),
    Row("sm_90", "x first", "bar.sync", 2),  # two stand before the atomic
    Row("sm_90", "fused", "cp.async.wait_group", 1),  # nothing is left to be copied after the loop
    Row("sm_90", "fused", "wgmma.wait_group"),
    Row("sm_90", "fused", "wgmma.commit_group"),
    Row("sm_90", "fused", "wgmma.fence", 1),  # the first product has no sum to read
    Row("sm_90", "fused", "fence.proxy.async"),
    Row("sm_90", "fused", "bar.sync"),
]


def _outcome(case: Case) -> str:
    """How it is noticed, or ""."""
    torch.manual_seed(0)
    try:
        case.run()
    except (FaultError, WrongError) as error:
        return f"{error}"
    return ""


def run(target: str) -> list[tuple[Row, int, list[str]]]:
    """(row, number of occurrences, those that are missed) of each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    results, settings.orders = [], ("forward",)
    own: dict[str, list[Program]] = {}
    with planned.emulated(target):
        for row in (row for row in ROWS if row.target == target):
            kernel, options = CASES[row.case]
            case, before = Case(kernel, "bf16", options, True), set(programs)
            if wrong := _outcome(case):
                raise RuntimeError(f"{case.label} is wrong without a change: {wrong}")
            own.setdefault(row.case, [programs[key] for key in programs.keys() - before])
            number, missed = 0, []
            for program in own[row.case]:
                words = ("acq_rel", "relaxed") if row.op == "atom" else None  # it is not taken out
                for instruction in found(program, row.op):
                    with changed(program, row.op, instruction, words):
                        is_noticed = bool(_outcome(case))
                    number += 1
                    if not is_noticed:
                        missed.append(f"{instruction.text} ({instruction.where})")
            results.append((row, number, missed))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.emulator.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, spawned, max_tasks_per_child=1) as pool:
        jobs = [pool.submit(run, target) for target in TARGETS]
        results = [result for job in jobs for result in job.result()]
    bad = 0
    for row, number, missed in results:
        good = number and len(missed) <= row.spare
        bad += not good
        shown = "ok" if good else "MISSED"
        print(f"{shown:8} {row.target} {row.case}: {row.op}, {number - len(missed)} of {number}")
        for line in () if good else missed:
            print(f"    {line}")
    print(f"{sum(number for _, number, _ in results)} synchronisations taken out, {bad} rows at fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
