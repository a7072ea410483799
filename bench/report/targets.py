"""Targets of the kernels on a GPU, and whether a run met them: by device time, the median of its rounds.

One layer of a large model stands for the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.schema import Result

LAYER = {"suite": "layer", "tokens": 8192, "out": 4096, "in": 4096, "rank": 16, "dtype": "bfloat16"}
# pass -> its time ÷ the bare model's at most
OVERHEADS = {names.FORWARD: 1.28, names.BACKWARD: 1.35}
# baseline -> its time ÷ ours at least
SPEEDUPS = {names.STOCK_16: 1.15, names.STOCK: 1.6, names.COMPILED: 0.98}
# Memory-bound kernels, and the share of a copy's bandwidth that each must reach, from TOKENS tokens
KERNELS = (names.DOWN_A, names.DOWN_B, names.UP_B, names.GRAD_A)
SHARE = 0.8
TOKENS = 4096


def targets(result: Result) -> pd.DataFrame:
    """A row a target, of a result with the sums of forward and backward."""
    rows = [*_overheads(result), *_speedups(result), *_bandwidths(result)]
    return pd.DataFrame(rows, columns=["what", "target", "measured", "met"])


def _row(what: str, sign: str, limit: float, measured: Ratio | None) -> list[str]:
    target = f"{sign} {limit:g}"
    if measured is None:
        return [what, target, "", "not measured"]
    is_met = measured.median <= limit if sign == "≤" else measured.median >= limit
    return [what, target, str(measured), "yes" if is_met else "**NO**"]


def _ratio(group: Group, name: str, baseline: str) -> Ratio | None:
    return group.ratio(name, baseline) if {name, baseline} <= group.timings.keys() else None


def _layer_ratio(result: Result, part: str, name: str, baseline: str) -> Ratio | None:
    """Of the layer that stands for the others, in the first of its cells that has both: with MiCA, without
    dropout, and what is compiled in its own."""
    for group in result.select(**LAYER, **{"pass": part, "clock": names.DEVICE_TIME}):
        is_plain = "dropout" not in group.axes and group.axes.get("adapter", names.MICA) == names.MICA
        if is_plain and {name, baseline} <= group.timings.keys():
            return group.ratio(name, baseline)
    return None


def _overheads(result: Result) -> Iterator[list[str]]:
    for part, limit in OVERHEADS.items():
        ratio = _layer_ratio(result, part, names.FAST, names.BARE)
        yield _row(f"a layer, {part}: {names.FAST} ÷ {names.BARE}", "≤", limit, ratio)


def _speedups(result: Result) -> Iterator[list[str]]:
    for name, limit in SPEEDUPS.items():
        ratio = _layer_ratio(result, names.BOTH, name, names.FAST)
        yield _row(f"a layer, {names.BOTH}: {name} ÷ {names.FAST}", "≥", limit, ratio)


def default_configuration(cell: Group) -> str | None:
    """Of a kernel, the first one in its cell; None where none has a number."""
    configurations = [name for name in cell.timings if name not in (names.COPY, names.CUBLAS)]
    return configurations[0] if configurations else None


def _bandwidths(result: Result) -> Iterator[list[str]]:
    """The slowest cell of each kernel, in its default configuration.

    A copy moves as many bytes, so the quotient of times is that of bandwidths.
    """
    for kernel in KERNELS:
        shares = []
        for group in result.select(suite="kernels", kernel=kernel, clock=names.DEVICE_TIME):
            default = default_configuration(group)
            if default is None or int(group.axes["tokens"]) < TOKENS:
                continue
            share = _ratio(group, names.COPY, default)
            if share is not None:
                shares.append((share, f"{group.name}, {default}"))
        slowest, where = min(shares, default=(None, f"from {TOKENS} tokens"))
        yield _row(f"{kernel}: bandwidth ÷ that of a copy; {where}", "≥", SHARE, slowest)
