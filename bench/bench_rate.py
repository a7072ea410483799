"""What this machine can do: rates of products and of a copy, the cost of a call. The cost model takes them.

Products of 2048 x 2048 matrices (fp64: 1024), skinny ones of 4096 x 2048 activations with 16 columns, a copy
of 256 MB, and an operator on 16 numbers, whose time is all overhead. ``flops`` and ``bytes`` are of one call.
"""

import functools
import time

import pytest
import torch

from bench.harness import DEVICE, finished, iterations, pick

ROUNDS = pick(quick=5, default=10)


def product(m: int, n: int, k: int, dtype: torch.dtype):
    a, b = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(n, k, device=DEVICE).to(dtype)
    return lambda: a @ b.t(), 2.0 * m * n * k, dtype.itemsize * (m * k + n * k + m * n)


def copy():
    source = torch.ones(256_000_000, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 0.0, 2 * source.numel()


def small_call():
    numbers = torch.zeros(16, device=DEVICE)
    return lambda: numbers.add_(1.0), float(numbers.numel()), 2 * 4 * numbers.numel()


RATES = {
    "bfloat16 product": functools.partial(product, 2048, 2048, 2048, torch.bfloat16),
    "float32 product": functools.partial(product, 2048, 2048, 2048, torch.float32),
    "float64 product": functools.partial(product, 1024, 1024, 1024, torch.float64),
    "skinny bfloat16 product": functools.partial(product, 4096, 16, 2048, torch.bfloat16),
    "skinny float32 product": functools.partial(product, 4096, 16, 2048, torch.float32),
    "copy": copy,
    "call": small_call,
}


@functools.lru_cache(maxsize=1)
def setting(rate):
    call, flops, bytes_ = RATES[rate]()
    finished(call)()
    start = time.perf_counter()
    finished(call)()
    return call, flops, bytes_, iterations(time.perf_counter() - start)


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("rate", RATES)
def bench_rate(once, rate, round_):
    call, flops, bytes_, count = setting(rate)
    axes = {"suite": "rate", "rate": rate}
    once(call, f"rate, {rate}", "measured", axes, count, warm_up=True, flops=flops, bytes=bytes_)
