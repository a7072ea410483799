"""``make emulate``: the kernels as compiled for sm_80 and sm_90, against fp64, without a GPU.

Each case calls a kernel as the product does, three times: planned and launched through Triton's front end,
launched by the kept plan with the CTAs in another order, and with several CTAs in turns. The results must
have the same bits and be near the one in fp64; whatever the emulator refuses is a fault.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

os.environ |= {"MICA_CACHE": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    sys.exit("the emulator runs compiled kernels: unset TRITON_INTERPRET")

import triton

from tests.emulator.cases import TARGETS
from tests.emulator.shares import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.emulator", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one (may be repeated)")
    parser.add_argument("--all", action="store_true", help="every configuration and layout")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose labels have them")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    args = parser.parse_args()
    start, targets = time.monotonic(), args.target or list(TARGETS)
    parts = max(2, args.processes)  # shorter jobs, so that the processes end together
    # Triton keeps what it compiled for a target in the process: each job has its own
    spawned = multiprocessing.get_context("spawn")
    results = []
    with ProcessPoolExecutor(args.processes, spawned, max_tasks_per_child=1) as pool:
        jobs = [pool.submit(run, target, part, parts, args) for target in targets for part in range(parts)]
        results = [job.result() for job in as_completed(jobs)]

    rows = sorted({(kernel, result.target) for result in results for kernel in result.counts})
    print(f"{'kernel':18} {'target':8} {'good':>6} {'refused':>8} {'faults':>7}  error / bound")
    for kernel, target in rows:
        own = [result for result in results if result.target == target and kernel in result.counts]
        counts = [sum(numbers) for numbers in zip(*(result.counts[kernel] for result in own), strict=True)]
        error = max(result.errors.get(kernel, 0.0) for result in own)
        print(f"{kernel:18} {target:8} {counts[0]:>6} {counts[1]:>8} {counts[2]:>7}  {error:.2f}")
    faults = [fault for result in results for fault in result.faults]
    total = sum(sum(counts) for result in results for counts in result.counts.values())
    sums = {name: sum(result.totals[name] for result in results) for name in results[0].totals}
    seconds = time.monotonic() - start
    print(f"{total} cases, {len(faults)} at fault, {seconds:.0f} s, triton {triton.__version__}")
    print(", ".join(f"{number:.0f} {name}" for name, number in sums.items()))
    print("\n".join(faults))
    return 1 if faults or not total else 0


if __name__ == "__main__":
    sys.exit(main())
