"""`get_peft_model` of SmolLM2-135M, all linear, r = 16, in one and in two gloo processes of one thread each.

Timed from when all processes have the model until all have the adapters. No time is reported unless all of
them, and the run with the other number of processes, have the same bits.
"""

import os
import subprocess
import sys

import pytest

from bench.measure.machine import ON_ACCELERATOR, ROOT, SIZE

pytestmark = pytest.mark.skipif(SIZE != "full" or ON_ACCELERATOR, reason="part of --full on a CPU")
ROUNDS = 3
PROCESS = """
import hashlib, sys
import torch, torch.distributed as dist
from tests.support import models

store, rank, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
base = models.smollm2()
dist.barrier()
print("READY", flush=True)
sys.stdin.readline()
model = models.wrap(base, rank=16, targets="all-linear")
print("DONE", flush=True)
bits = b"".join(basis.detach().numpy().tobytes() for basis in models.bases(model).values())
print(hashlib.blake2b(bits).hexdigest(), flush=True)
dist.barrier()
"""

digests: set[str] = set()


def wait_for(process, word):
    for line in process.stdout:
        if line.strip() == word:
            return
    raise RuntimeError(f"a process ended before it printed {word}")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_distributed(once, tmp_path, round_, count):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "store"), str(rank), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        for rank in range(count)
    ]
    for process in processes:
        wait_for(process, "READY")

    def initialise():
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            wait_for(process, "DONE")

    implementation = "1 process" if count == 1 else f"{count} processes"
    axes = {"suite": "distributed", "model": "SmolLM2-135M", "rank": 16}
    once(initialise, "get_peft_model, float32, processes of one thread", implementation, axes)
    digests.update(process.stdout.readline() for process in processes)
    for process in processes:
        process.communicate()
    assert len(digests) == 1, "no timing of differing results"
