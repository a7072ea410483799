"""Weights with known trouble, by name: what a minor-subspace solver must survive.

``weight(name, out_features, in_features)`` is fp64-generated and rounded to fp32; the truth is always the
fp64 SVD of the rounded weight. ``RANK`` is the cut that the "cluster" cases are built around.
"""

from collections.abc import Callable

import torch

RANK = 8
DTYPE = torch.float64


def _gaussian(out_features: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(out_features, in_features, dtype=DTYPE, generator=generator)


def from_values(values_of: Callable[[int], torch.Tensor]):
    """Random singular vectors around ``values_of(count)``, the singular values."""

    def build(out_features, in_features, generator):
        count = min(out_features, in_features)
        left = torch.linalg.qr(_gaussian(out_features, count, generator)).Q
        right = torch.linalg.qr(_gaussian(in_features, count, generator)).Q
        return left * values_of(count) @ right.T

    return build


def _small_tail(count: int) -> torch.Tensor:
    values = torch.linspace(2, 1, count, dtype=DTYPE)
    values[-RANK:] *= 1e-6
    return values


def _cluster(above: int, below: int):
    """Equal values from ``above`` places before the cut to ``below`` places after it."""

    def values_of(count: int) -> torch.Tensor:
        values = torch.linspace(3, 1, count, dtype=DTYPE)
        first = max(0, count - RANK - above)
        last = max(first + 1, count - RANK + below)
        values[first:last] = values[first]
        return values

    return values_of


def _low_rank(lost: int):
    """Small integers: products and sums are exact, and so is the rank deficiency, in fp32 too."""

    def build(out_features, in_features, generator):
        kept = max(1, min(out_features, in_features) - lost)
        left = torch.randint(-3, 4, (out_features, kept), generator=generator)
        right = torch.randint(-3, 4, (kept, in_features), generator=generator)
        return (left @ right).to(DTYPE)

    return build


def _duplicates(out_features, in_features, generator):
    weight = _gaussian(out_features, in_features, generator)
    weight[-5:] = weight[:5].clone()
    weight[:, -4:] = weight[:, :4].clone()
    return weight


def _zeros(out_features, in_features, generator):
    weight = _gaussian(out_features, in_features, generator)
    weight[2:7] = 0
    weight[:, 3:6] = 0
    return weight


def _corner(out_features, in_features, generator):
    """Krylov subspaces are exhausted after ten steps, and rounding errors too stay in the corner."""
    weight = torch.zeros(out_features, in_features, dtype=DTYPE)
    weight[:10, :10] = _gaussian(10, 10, generator)[: len(weight), :in_features]
    return weight


def _row_scales(out_features, in_features, generator):
    scales = torch.exp(1.5 * torch.randn(out_features, 1, dtype=DTYPE, generator=generator))
    return scales * _gaussian(out_features, in_features, generator)


def _scaled(factor: float):
    return lambda *arguments: factor * _gaussian(*arguments)


SPECTRA: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    "gaussian": _gaussian,
    # down to zero linearly, as a square Gaussian's
    "hard edge": from_values(lambda count: torch.linspace(1, 1 / count, count, dtype=DTYPE)),
    "graded to 1e-7": from_values(lambda count: torch.logspace(0, -7, count, dtype=DTYPE)),
    # the smallest one just above what a Gram matrix resolves
    "graded to 1.6e-6": from_values(lambda count: torch.logspace(0, -5.8, count, dtype=DTYPE)),
    "tail x 1e-6": from_values(_small_tail),
    "flat": from_values(lambda count: torch.ones(count, dtype=DTYPE)),
    "cluster inside": from_values(_cluster(-2, RANK - 1)),
    "cluster across": from_values(_cluster(5, 4)),
    "cluster beyond": from_values(_cluster(12, 0)),
    "rank deficient by 3": _low_rank(3),
    "rank deficient by most": _low_rank(10_000),
    "rank 5": lambda o, i, g: _low_rank(min(o, i) - 5)(o, i, g),
    "duplicate rows and columns": _duplicates,
    "zero rows and columns": _zeros,
    "zero but for a corner": _corner,
    "zero": lambda o, i, g: torch.zeros(o, i, dtype=DTYPE),
    "row scales": _row_scales,
    "times 1e4": _scaled(1e4),
    "times 1e-4": _scaled(1e-4),
}

# With exactly null singular values among the smallest: a tall weight leaves those vectors open.
NULL = {name for name in SPECTRA if name.startswith(("rank", "duplicate", "zero"))}


def weight(name: str, out_features: int, in_features: int) -> torch.Tensor:
    """The (out_features, in_features) fp32 weight of that name, the same on every call."""
    seed = 1000 * out_features + in_features
    return SPECTRA[name](out_features, in_features, torch.Generator().manual_seed(seed)).float()


def stack(names, shape: tuple[int, int]) -> torch.Tensor:
    return torch.stack([weight(name, *shape) for name in names])
