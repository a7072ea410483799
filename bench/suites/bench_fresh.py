"""A training step as a user takes it: a fresh process with default threads and allocator, by the wall clock.

In each round every implementation gets a process of its own, in turns. Within one process what ran before
decides how many page faults a step pays, and so do two implementations that take turns there: glibc raises
its thresholds. A sample is the median of a few steps of `bench_step`, which checks results; here each step
has to run the operators that its name implies. ``page_faults``: of one step.
"""

import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

import pytest
import torch

import mica.fast
from bench.measure.machine import ON_ACCELERATOR, ROOT
from bench.results import throughput
from bench.results.names import MICA, PLAIN_LORA, WALL
from bench.suites.bench_step import AUTOCAST, DROPOUT, Cell, build, work_of
from bench.suites.decoder import SMOLLM2
from bench.suites.harness import each, pick
from bench.suites.rounds import Once, prepared, rounds

pytestmark = pytest.mark.skipif(ON_ACCELERATOR, reason="measured on a CPU")
STEPS = 3  # of which a sample is the median, after an untimed one
FEWEST = pick(default=6, dry=1)  # rounds
SECONDS = pick(default=900.0, dry=0.0)  # of a cell
# What would change a process: PyTorch's and SciPy's threads, glibc's allocator
NOT_DEFAULT = ("OMP_", "MKL_", "OPENBLAS_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
CELLS = [
    Cell(SMOLLM2, tokens, dtype, how=how, adapter=adapter, suite="fresh")
    for adapter in (MICA, PLAIN_LORA)
    for tokens, dtype, how in (
        ((2, 512), "bfloat16", ""),
        ((2, 512), "bfloat16", DROPOUT),
        ((2, 512), "bfloat16", AUTOCAST),
        ((1, 256), "float32", ""),  # for processors without 16-bit instructions
    )
]


def saved_work(cell: Cell, folder):
    """A file with the models and tokens: to read them anew would take each process 15 s."""
    file = folder / "work.pt"
    torch.save((cell, work_of(cell)), file)
    return file


def in_a_process(file, implementation: str) -> dict[str, float]:
    """What `main` prints there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_DEFAULT)}
    environment["MICA_BENCH_FRESH"] = "1"
    command = [sys.executable, "-m", "bench.suites.bench_fresh", str(file), implementation]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().rpartition("\n")[2]
    return json.loads(done.stdout.splitlines()[-1])


def main(file: str, implementation: str) -> None:
    mica.fast.enable(lora=True)
    cell, work = torch.load(file, weights_only=False)
    step = build(cell, work, implementation)
    clocks = []

    def once(call, axes, calls):
        for _ in range(1 + calls):
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            before = time.perf_counter()
            call()
            seconds = time.perf_counter() - before
            clocks.append((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))

    once.implementation = implementation
    step.time(once, {}, STEPS)
    seconds, faults = (median(values) for values in zip(*clocks[1:], strict=True))
    print(json.dumps({"seconds": seconds, "page_faults": faults, "threads": torch.get_num_threads()}))


@each(CELLS)
def bench_fresh(cell, tmp_path):
    file = prepared(cell.name, lambda: saved_work(cell, tmp_path))

    def sample(once: Once, name: str) -> None:
        facts = in_a_process(file, name)
        once.work = throughput.of_axes(cell.axes)
        once.add(facts.pop("seconds"), cell.axes, facts, WALL)

    rounds(cell.name, cell.implementations, sample, SECONDS, FEWEST)


if __name__ == "__main__":
    main(*sys.argv[1:])
