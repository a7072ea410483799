"""How quiet the machine is: one product of PyTorch's, timed as if it were two implementations.

Their ratio is 1 but for noise, so its interval is what a ratio of this run cannot be narrower than; and the
wall clock runs faster than the CPU time where other processes take turns on this core.
"""

import torch

from bench.measure.machine import DEVICE
from bench.results.names import AGAIN, PRODUCT
from bench.suites.rounds import Once, rounds

SIZE = 512
CALLS = 10  # in a sample
GROUP = f"one product of {SIZE} x {SIZE} x {SIZE}, float32, twice"


def bench_quiet():
    left, right = torch.randn(2, SIZE, SIZE, device=DEVICE)
    axes = {"suite": "quiet", "out": SIZE, "in": SIZE, "dtype": "float32"}

    def sample(once: Once, name: str) -> None:
        once(lambda: left @ right, axes, CALLS)

    rounds(GROUP, (PRODUCT, AGAIN), sample)
