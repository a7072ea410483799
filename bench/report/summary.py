"""The summary of a run: one line per question, with the figures that answer it."""

from __future__ import annotations

from statistics import median

from bench.report.cells import by_clock, clocks, having, whole
from bench.results import names
from bench.results.cell import Ratio
from bench.results.names import BARE, BOTH, FAST, STOCK, STOCK_16, WALL
from bench.results.schema import Result

SHOWN = 6
FEW_TOKENS = 256  # below, the cost of calls dominates on a CPU

# (title, remark, baseline)
SLOWER = (
    ("stock PEFT", "", STOCK),
    ("stock PEFT told to keep adapters in 16 bit", " (not its default)", STOCK_16),
    ("that under `torch.compile`", "", names.COMPILED),
    ("the control", ", plain PyTorch with less precise dA", names.ATEN),
)
NOT_MEASURED = "not measured in this run."


def summary(result: Result) -> list[str]:
    """Markdown lines; one that this run has no figures for says so.

    On an accelerator they are wall-clock times; lines over many cells are repeated for device time.
    """
    wall = by_clock(result, WALL)
    lines = {
        "**Initialisation**": _once(wall, "initialisation"),
        "**A training step**": _step(wall),
        "**Loading an adapter**": _once(wall, "loading"),
        "**Memory**": _memory(wall),
    }
    for clock in (WALL, names.DEVICE_TIME) if clocks(result) else (WALL,):
        part, by = by_clock(result, clock), f", {clock}" if clocks(result) else ""
        for title, remark, baseline in SLOWER:
            lines[f"**Where it is not faster than {title}**{by}{remark}"] = _slower(part, baseline)
        for title, baseline, tokens in (
            (
                f"**Layers with {FEW_TOKENS} tokens or more**{by}, against stock PEFT",
                STOCK,
                (FEW_TOKENS, 2**62),
            ),
            (f"**Layers with fewer tokens**{by}, against stock PEFT", STOCK, (0, FEW_TOKENS)),
            (f"**All layers**{by}, against stock PEFT with adapters in 16 bit", STOCK_16, (0, 2**62)),
        ):
            lines[title] = _layers(part, baseline, range(*tokens))
    return [f"- {title}: {figures}" for title, figures in lines.items()]


def _inverse(ratio: Ratio) -> str:
    """As "1.42× (1.38–1.47)", how many times as fast."""
    low, high = (1 / ratio.high if ratio.high else 0.0), (1 / ratio.low if ratio.low else float("inf"))
    return str(Ratio(1 / ratio.median, low, high)).replace(" ", "× ", 1)


def _joined(parts: list[str]) -> str:
    return "; ".join(parts) + "." if parts else NOT_MEASURED


def _once(result: Result, suite: str) -> str:
    """Of what happens to an adapter once; seconds."""
    parts = []
    for group in having({FAST, STOCK}, result.select(suite=suite)):
        seconds = " → ".join(f"{group.timings[name].median:.3g} s" for name in (STOCK, FAST))
        what = group.axes.get("model", group.name)
        parts.append(f"{_inverse(group.ratio(FAST, STOCK))} as fast as stock PEFT for {what} ({seconds})")
    return _joined(parts)


def _step(result: Result) -> str:
    parts = []
    for group in having({FAST, STOCK}, result.select(suite="step")):
        text = f"{group.name}: {_inverse(group.ratio(FAST, STOCK))} as fast"
        if BARE in group.timings:
            ours, stock = (group.ratio(name, BARE).median for name in (FAST, STOCK))
            text += f", {ours:.2f} times the {BARE}, {STOCK} {stock:.2f} times"
        parts.append(text)
    return _joined(parts)


def _memory(result: Result) -> str:
    parts = []
    for group in having({STOCK, FAST, BARE}, result.select(suite="step")):
        stock, ours, bare = (group.timings[name].facts.get("saved_mb") for name in (STOCK, FAST, BARE))
        if None not in (stock, ours, bare):
            parts.append(
                f"{group.name}: {stock - ours:.0f} MB less are saved for the backward "
                f"({stock:.0f} → {ours:.0f} MB, the bare model {bare:.0f} MB)"
            )
    return _joined(parts)


def _slower(result: Result, baseline: str) -> str:
    cells = [*whole(result), *result.select(**{"pass": names.NO_GRADIENT})]
    ratios = [(group.ratio(FAST, baseline), group.name) for group in having({FAST, baseline}, cells)]
    slower = sorted((one for one in ratios if one[0].median >= 1), reverse=True)
    if not slower:
        return f"nowhere, in {len(ratios)} cells." if ratios else NOT_MEASURED
    texts = [f"{name}: {ratio}" for ratio, name in slower[:SHOWN]]
    if len(slower) > SHOWN:
        texts.append(f"the others are less slow, {slower[-1][0].median:.3f} or more (tables below)")
    return f"{len(slower)} of {len(ratios)} cells (ratios of time): {_joined(texts)}"


def _layers(result: Result, baseline: str, tokens: range) -> str:
    """The range over the cells with so many tokens, and their median."""
    parts = []
    for dtype in ("bfloat16", "float32"):
        faster = [
            1 / group.ratio(FAST, baseline).median
            for group in having({FAST, baseline}, result.select(suite="layer", dtype=dtype, **{"pass": BOTH}))
            if group.axes["tokens"] in tokens
        ]
        if faster:
            parts.append(
                f"{dtype}, {len(faster)} cells: {min(faster):.2f}× to {max(faster):.2f}× as fast, "
                f"median {median(faster):.2f}×"
            )
    return _joined(parts)
