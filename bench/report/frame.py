"""A result as a table of pandas: a row for each implementation of a cell, its axes and what was measured."""

from __future__ import annotations

import pandas as pd

from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.names import BARE, BOTH, LORA, STOCK, WALL
from bench.results.schema import Result

IMPLEMENTATION, SECONDS, CELL = "implementation", "seconds", "cell"
ONE_PROCESS = "1 process"
# What an implementation's time is divided by, round by round, where its cell has it
BASELINES = (BARE, STOCK, names.STOCK_16, LORA, names.FLOAT32, names.SVD, ONE_PROCESS, names.COPY)
OVERHEAD = f"overhead ÷ that of {LORA}"

# How a reader calls the value of an axis; of the others it is enough to see the value
_IN_WORDS = {
    "tokens": "{} tokens",
    "rank": "r = {}",
    "sequence": "{} tokens a sequence",
    "new tokens": "{} new tokens",
    "layers": "{} blocks",
    "weights": "{} weights",
    "experts": "{} experts",
    "features": "{} features",
    "autocast": "autocast to {}",
}
_UNNAMED = ("suite", "pass")


def against(baseline: str) -> str:
    """The column of ratios to it."""
    return f"÷ {baseline}"


def frame(result: Result) -> pd.DataFrame:
    """What was timed, the passes that a user waits for: no forward or backward alone."""
    rows = []
    for group in result.with_both().groups:
        if group.axes.get("pass") in (None, BOTH, names.NO_GRADIENT):
            rows += [_row(group, name) for name in group.timings]
    data = pd.DataFrame(rows, dtype=object)  # or the whole numbers of an axis that some lack become fractions
    return data.astype({SECONDS: float}) if rows else data


def _row(group: Group, name: str) -> dict:
    timing = group.timings[name]
    row = {"suite": "", "clock": WALL, **group.axes}
    if {"out", "in"} <= row.keys():
        row["out × in"] = f"{row.pop('out')} × {row.pop('in')}"
    row |= {CELL: group.name, IMPLEMENTATION: name, SECONDS: timing.median, **timing.throughput}
    for baseline in BASELINES:
        if baseline in group.timings and name not in (BARE, baseline):
            row[against(baseline)] = group.ratio(name, baseline)
    if {LORA, BARE} <= group.timings.keys() and name not in (LORA, BARE):
        row[OVERHEAD] = group.overhead(name, LORA)
    return row | timing.facts


def rounds(groups: list[Group], implementations: list[str]) -> pd.DataFrame:
    """A row a round: the tokens in the batch, the implementation, how many tokens it passed in a second."""
    rows = [
        {"tokens": group.axes["tokens"], IMPLEMENTATION: name, "tokens/s": group.axes["tokens"] / seconds}
        for group in groups
        for name in implementations
        if name in group.timings
        for seconds in group.timings[name].seconds
    ]
    return pd.DataFrame(rows, columns=["tokens", IMPLEMENTATION, "tokens/s"])


def in_words(axes: dict[str, str | int]) -> str:
    """As "Llama-3.2-1B, 2048 × 2048, 1024 tokens, r = 16, bfloat16", for the labels of a picture."""
    shown = {axis: value for axis, value in axes.items() if axis not in _UNNAMED}
    if shown.get("sequence") == shown.get("tokens"):  # a batch of one
        shown.pop("sequence", None)
    words = [str(shown.pop("model"))] if "model" in shown else []
    if {"out", "in"} <= shown.keys():
        words.append(f"{shown.pop('out')} × {shown.pop('in')}")
    words += [_IN_WORDS.get(axis, "{}").format(value) for axis, value in shown.items()]
    return ", ".join(words)


def inverse(ratio: Ratio) -> Ratio:
    """How many times as fast, of a ratio of times."""
    high = 1 / ratio.low if ratio.low else float("inf")
    return Ratio(1 / ratio.median, 1 / ratio.high, high)
