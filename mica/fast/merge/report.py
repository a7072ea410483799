"""What rounding did to merged updates: the numbers of a weight, and the report over a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass
class MergeStats:
    """How much of the updates merged into one weight survived its dtype."""

    dtype: torch.dtype
    weights: int = 0
    unchanged: int = 0
    update_squared: float = 0.0
    error_squared: float = 0.0

    def add(self, other: MergeStats) -> None:
        self.weights += other.weights
        self.unchanged += other.unchanged
        self.update_squared += other.update_squared
        self.error_squared += other.error_squared

    @property
    def swallowed(self) -> float:
        """‖(W' - W) - s·B·A‖ / ‖s·B·A‖ in the Frobenius norm: 0 if nothing was lost, 1 if all of it was."""
        if not self.update_squared:
            return 0.0
        return math.sqrt(self.error_squared / self.update_squared)


def sum_stats(parts: list[MergeStats]) -> MergeStats:
    total = MergeStats(parts[0].dtype)
    for stats in parts:
        total.add(stats)
    return total


@dataclass(repr=False)
class MergeReport:
    """The share of the update that rounding swallowed, per merged layer and over all of them: shown in words.

    ``unmeasured``: layers that were merged into a quantised weight, and its kind. Their library has rounded
    the sum to its 4 or 8 bits, and what that lost is not known.
    """

    layers: dict[str, MergeStats] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> MergeStats:
        if not self.layers:
            return MergeStats(torch.float32)
        return sum_stats(list(self.layers.values()))

    @property
    def swallowed(self) -> float:
        """Over the measured layers; NaN where only quantised ones were merged."""
        if self.unmeasured and not self.layers:
            return math.nan
        return self.total.swallowed

    def __repr__(self) -> str:
        if not self.layers and not self.unmeasured:
            return "nothing was merged by mica.fast"
        parts = []
        if self.layers:
            parts.append(self._sentence_on_measured())
        if self.unmeasured:
            kinds = ", ".join(dict.fromkeys(self.unmeasured.values()))
            parts.append(
                f"{len(self.unmeasured)} layers merged into quantised weights ({kinds}): not measured, and "
                "not exact, because the library rounds the sum to 4 or 8 bits again and loses small updates"
            )
        return "; ".join(parts)

    def _sentence_on_measured(self) -> str:
        total = self.total
        dtype = str(total.dtype).removeprefix("torch.")
        worst = max(self.layers, key=lambda name: self.layers[name].swallowed)
        unchanged = total.unchanged / total.weights
        return (
            f"{len(self.layers)} layers merged into {dtype}: rounding swallowed {total.swallowed:.2%} of the "
            f"update (Frobenius norm; most in {worst}: {self.layers[worst].swallowed:.2%}), {unchanged:.2%} "
            "of the weights did not move"
        )
