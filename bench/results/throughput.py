"""What one call does, as an amount of work, and how much of it is done in a second.

Work is a dict from a unit to an amount: ``{"tokens": 1024}``, ``{"matrices": 210, "flop": 3.4e11}``,
``{"bytes": 7.1e7}``. A result keeps the work and the seconds; a throughput is always computed from the two.
"""

from __future__ import annotations

from collections.abc import Mapping

TOKENS = "tokens"
MATRICES = "matrices"
FLOP = "flop"
BYTES = "bytes"

# unit of the work -> (unit of the throughput, how much work one of it is)
UNITS = {
    TOKENS: ("tokens/s", 1.0),
    MATRICES: ("matrices/s", 1.0),
    FLOP: ("GFLOP/s", 1e9),
    BYTES: ("GB/s", 1e9),
}


def of_axes(axes: Mapping[str, str | int]) -> dict[str, float]:
    """The work of a cell that names no other: the tokens that a call passes through the layers."""
    if "tokens" not in axes:
        return {}
    return {TOKENS: float(axes["tokens"])}


def gram_flop(out_features: int, in_features: int) -> float:
    """Operations of the Gram matrix of the smaller side, the nominal work of a minor subspace.

    2·m·n·min(m, n): every method here and the full SVD need more than this, so a GFLOP/s of initialisation
    compares methods and sizes; it is no share of a processor's peak.
    """
    return 2.0 * out_features * in_features * min(out_features, in_features)


def per_second(work: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Unit of the throughput -> its value."""
    if seconds <= 0:
        return {}
    rates = {}
    for unit, amount in work.items():
        name, one = UNITS[unit]
        rates[name] = amount / one / seconds
    return rates


def in_words(work: Mapping[str, float], seconds: float) -> str:
    """As "27,300 tokens/s" or "3.12 matrices/s, 1,190 GFLOP/s"."""
    return ", ".join(f"{number(value)} {unit}" for unit, value in per_second(work, seconds).items())


def number(value: float) -> str:
    """Three digits; no exponent above a hundred."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"
