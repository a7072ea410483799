"""MODELLED, not measured: initialising every adapted weight of a model (for ``-m bench.model``).

Ours is `bench.solver_cost`: the solver's own code for accelerators, run here on Gaussian weights of each
shape while its work is counted. Stock PEFT takes a thin fp32 SVD of every weight on the device of the weight;
its operations are LAPACK's count, its speed an assumed share of the rate of fp32 products.
"""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

from bench import solver_cost
from bench.architectures import Architecture
from mica.subspace.device import batch_size

# ASSUMED shares of the fp32 rate that an SVD reaches: what is taken, and the range it may lie in. GPUs: times
# that others have published (A100, n = 1024; Titan X, n = 4160) come to 0.3 to 3 %. CPUs: times in
# bench/results come to 10 % for SmolLM2's weights and 40 % for 4096 x 4096, at 200 GF/s for products.
SVD_SHARE = {"gpu": (0.01, 0.003, 0.03), "cpu": (0.2, 0.1, 0.4)}

# A weight whose shorter side is longer is not solved here: n = 8192 takes minutes and 2 GB on a CPU.
LARGEST = 4096


def svd_flops(out: int, inner: int) -> float:
    """LAPACK's divide and conquer (gesdd), thin, of the tall view: m ≥ n.

    Bidiagonal form 4mn² − 4n³/3, its SVD 8n³/3 without deflation, vectors back 4mn² − 2n³ and 2n³; or, where
    that is less, QR first: 4mn² − 4n³/3 for R and Q, 2mn² for Q U, and 28n³/3 for R.
    """
    m, n = max(out, inner), min(out, inner)
    return float(min(8 * m * n**2 + 4 * n**3 / 3, 6 * m * n**2 + 8 * n**3))


def stock_seconds(model: Architecture, fp32: float, share: float) -> float:
    """All SVDs, one after the other; ``fp32``: products, flop/s."""
    flops = sum(count * svd_flops(*shape) for shape, count in model.weights().items())
    return flops / (fp32 * share)


class Solved(NamedTuple):
    """All ``count`` weights of a shape: modelled seconds, flops, bytes, launches."""

    shape: tuple[int, int]
    count: int
    seconds: float
    flops: float
    bytes: float
    launches: float


def ours(model: Architecture, device: str, rank: int) -> list[Solved]:
    """A row a shape. The solver runs once a shape, on the batch that it would be given."""
    weak, found = solver_cost.DEVICES[device].weak_fp64, []
    for shape, count in model.weights().items():
        batch = min(count, batch_size(*shape))
        start = time.monotonic()
        print(f"counting the solver on {batch} of {count} weights {shape[0]} x {shape[1]} …", file=sys.stderr)
        cost = solver_cost.modelled(shape, rank, batch, weak)
        print(f"  {time.monotonic() - start:.0f} s", file=sys.stderr)
        times, flops = count / batch, cost.flops.total()
        totals = (cost.seconds[device], flops, cost.bytes, cost.launches)
        found.append(Solved(shape, count, *(times * total for total in totals)))
    return found


def why_not(model: Architecture, device: str, rank: int) -> str | None:
    """Why ours has no modelled initialisation there; None if it has."""
    if device not in solver_cost.DEVICES:
        return (
            f"no rates of fp64 are assumed for {device}" if device != "measured" else "the host solves there"
        )
    short = max(min(shape) for shape in model.weights())
    if short > LARGEST:
        return f"weights of {short} are too large to be solved here for the count"
    return None
