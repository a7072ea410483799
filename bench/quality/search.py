"""Which learning rate to try next, and which of the tried ones a method gets; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

FACTOR = 2.0  # from the best rate to one beyond what was tried


def next_rate(tried: dict[float, float], rates: Sequence[float], limit: int) -> float | None:
    """The learning rate to try after ``tried``: rate -> validation loss, infinite where it diverged.

    First all of ``rates``, then beyond the best one while that is at an edge of what was tried. None when the
    best one is enclosed, or when there are ``limit`` tries.
    """
    if len(tried) >= limit:
        return None
    for rate in rates:
        if rate not in tried:
            return rate
    rate = best(tried)
    if rate is None:
        return _rounded(min(tried) / FACTOR)
    below, above = _neighbours(tried, rate)
    if above is None:
        return _rounded(rate * FACTOR)
    return _rounded(rate / FACTOR) if below is None else None


def best(tried: dict[float, float]) -> float | None:
    """The rate with the lowest finite validation loss, None if there is none."""
    finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__, default=None)


def is_enclosed(tried: dict[float, float]) -> bool:
    """Whether worse rates were tried on both sides of the best; otherwise a better one may lie outside."""
    rate = best(tried)
    return rate is not None and None not in _neighbours(tried, rate)


def _neighbours(tried: dict[float, float], rate: float) -> tuple[float | None, float | None]:
    return (
        max((other for other in tried if other < rate), default=None),
        min((other for other in tried if other > rate), default=None),
    )


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
