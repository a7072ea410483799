"""One table of tolerances for all tests: relative error against an fp64 oracle, per dtype.

``error(actual, oracle)`` is the Frobenius norm of the difference over that of the oracle.
The figures are a few unit round-offs of the dtype, times sqrt(length) of the longest sum.
"""

import torch

RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1.5e-3,
}


def error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """Relative Frobenius error of ``actual`` against the fp64 ``oracle``; nan and inf count as inf."""
    actual, oracle = actual.detach().double(), oracle.detach().double()
    if actual.shape != oracle.shape or not torch.isfinite(actual).all():
        return float("inf")
    scale = oracle.norm().item()
    return (actual - oracle).norm().item() / scale if scale else actual.norm().item()
