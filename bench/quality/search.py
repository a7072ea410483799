"""Which learning rate to try next, and which of the tried ones a method gets; no torch."""

from __future__ import annotations

import math

FACTOR = 3.0  # between neighbours of the grid


def next_rate(tried: dict[float, float], start: float) -> float:
    """The learning rate to try after ``tried``: rate -> validation loss, infinite where it diverged.

    First ``start`` and its upper neighbour; then beyond the best one while that is at an edge of what was
    tried; with worse ones on both sides, halfway (in the logarithm) to the better of these. So every method
    gets the same number of tries, and spends them where it is good, wherever its ``start`` was.
    """
    if not tried:
        return start
    rate = best(tried)
    if rate is None:
        return _rounded(min(tried) / FACTOR)
    below, above = _neighbours(tried, rate)
    if above is None:
        return _rounded(rate * FACTOR)
    if below is None:
        return _rounded(rate / FACTOR)
    return _rounded(math.sqrt(rate * min(below, above, key=tried.__getitem__)))


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
