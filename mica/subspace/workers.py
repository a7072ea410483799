"""Many small matrices at once: one thread each, instead of all threads on one after another.

Up to about n = 1000 a partial eigenproblem spends its time in short loops whose threads wait for each
other, and SciPy's BLAS and PyTorch's each have their own pool. With one thread per matrix nothing
waits, not for the interpreter either (``lapack``): the 210 layers of SmolLM2-135M take 5.2 s on one core
and 2.9 s on two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

from mica.subspace.threads import blas_threads, set_torch_threads

Item = TypeVar("Item")

# min(out_features, in_features) up to which a matrix gets one thread.
SMALL = 1024

# At once: each holds an (n, n) fp64 matrix, a block of rows (8 MiB both at most) and one of the buffers of
# OpenBLAS, of which there is a fixed number.
MOST_WORKERS = 32


def is_small(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and min(weight.shape) <= SMALL


def run(
    function: Callable[[Item], None], items: Sequence[Item], small: Callable[[Item], bool]
) -> Iterator[Item]:
    """Call ``function`` on every item and yield each when it is done, the small ones in parallel first.

    The first exception ends it: what has not begun is cancelled, what runs is waited for. The thread counts
    of the caller are as before, afterwards.
    """
    parallel = [item for item in items if small(item)]
    workers = min(torch.get_num_threads(), len(parallel), MOST_WORKERS)
    if workers > 1:
        with (
            blas_threads(1),
            ThreadPoolExecutor(workers, "mica-subspace", set_torch_threads, (1,)) as pool,
        ):
            futures = {pool.submit(function, item): item for item in parallel}
            try:
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            finally:
                pool.shutdown(cancel_futures=True)
    else:
        for item in parallel:
            function(item)
            yield item
    for item in items:
        if not small(item):
            function(item)
            yield item
