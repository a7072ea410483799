"""The questions that a run answers, each in one line with its figure."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from bench.results.names import (
    ATEN,
    BARE,
    BOTH,
    COMPILED,
    FAST,
    KERNELS,
    KERNELS_16,
    KERNELS_GROUPED,
    MERGED,
    NO_GRADIENT,
    PYTORCH,
    PYTORCH_16,
    PYTORCH_GROUPED,
    STOCK,
    STOCK_16,
    UNGROUPED,
)
from bench.results.schema import Group, Ratio, Result

SHOWN = 6
FEW_TOKENS = 256  # below, the cost of calls dominates on a CPU

HOST_RATIO = "mica.fast ÷ stock PEFT with adapters in the base dtype"
_LAYER_FORMS = (PYTORCH, PYTORCH_16, KERNELS, KERNELS_16)
_BLOCK_FORMS = (PYTORCH_GROUPED, KERNELS_GROUPED)
# (title, suite, call, forms of mica.fast, ratio that is asked for)
HOST = (
    ("Host time of a layer", "host layer", BOTH, _LAYER_FORMS, 0.8),
    ("Host time of a layer", "host layer", NO_GRADIENT, _LAYER_FORMS, 1.0),
    ("Host time of a decoder block, grouped", "host block", BOTH, _BLOCK_FORMS, 0.7),
)
GENERATE_AT_MOST = 1.0


def inverse(ratio: Ratio) -> str:
    """As "1.42× (1.38–1.47)", how many times as fast."""
    low, high = (1 / ratio.high if ratio.high else 0.0), (1 / ratio.low if ratio.low else float("inf"))
    return str(Ratio(1 / ratio.median, low, high)).replace(" ", "× ", 1)


def answers(result: Result) -> list[str]:
    """Markdown lines; a question that this run cannot answer is said to be open."""
    return [
        f"- **Initialisation**: {_once(result, 'initialisation')}",
        f"- **A training step**: {_step(result)}",
        f"- **Loading an adapter**: {_once(result, 'loading')}",
        f"- **Memory**: {_memory(result)}",
        f"- **Where it is not faster than stock PEFT**: {_slower(result, STOCK)}",
        f"- **Where it is not faster than stock PEFT told to keep adapters in 16 bit** (not its default): "
        f"{_slower(result, STOCK_16)}",
        f"- **Where it is not faster than that under `torch.compile`**: {_slower(result, COMPILED)}",
        f"- **Where it is not faster than the control**, plain PyTorch with less precise dA: "
        f"{_slower(result, ATEN)}",
        f"- **Layers with {FEW_TOKENS} tokens or more**, against stock PEFT: {_layers(result, STOCK)}",
        f"- **All layers**, against stock PEFT with adapters in 16 bit: {_layers(result, STOCK_16, 0)}",
        f"- **Layers with fewer than {FEW_TOKENS} tokens**, mica.fast ÷ stock PEFT: {_few_tokens(result)}",
        *(
            f"- **{title}**, {call}, {HOST_RATIO} (asked: at most {most}): "
            f"{_host(result, suite, call, forms, most)}"
            for title, suite, call, forms, most in HOST
        ),
        f"- **generate()**, adapter unmerged, mica.fast ÷ stock PEFT (asked: at most {GENERATE_AT_MOST}): "
        f"{_generate(result)}",
    ]


NOT_MEASURED = "not measured in this run."


def _told(parts: list[str]) -> str:
    return "; ".join(parts) + "." if parts else NOT_MEASURED


def _once(result: Result, suite: str) -> str:
    """Of what happens to an adapter once; seconds."""
    return _told(
        [
            f"{inverse(group.ratio(FAST, STOCK))} as fast as stock PEFT for {group.axes['model']} "
            f"({group.rivals[STOCK].median:.1f} s → {group.rivals[FAST].median:.3g} s)"
            for group in result.select(suite=suite)
        ]
    )


def _step(result: Result) -> str:
    parts = [
        f"{group.axes['dtype']}, {group.axes['tokens']} tokens: {inverse(group.ratio(FAST, STOCK))} as fast, "
        f"{group.ratio(FAST, BARE).median:.2f} times the bare frozen model, stock PEFT "
        f"{group.ratio(STOCK, BARE).median:.2f} times"
        for group in result.select(suite="step")
    ]
    return _told(parts)


def _memory(result: Result) -> str:
    parts = []
    for group in result.select(suite="step"):
        stock, ours, bare = (group.rivals[name].facts.get("saved_mb") for name in (STOCK, FAST, BARE))
        if None in (stock, ours, bare):
            continue
        parts.append(
            f"{group.axes['dtype']}, {group.axes['tokens']} tokens: {stock - ours:.0f} MB less are saved for "
            f"the backward ({stock:.0f} → {ours:.0f} MB, the bare model {bare:.0f} MB)"
        )
    return _told(parts)


def cells(result: Result) -> Iterator[Group]:
    """Forward and backward of a layer summed; the other suites as they are."""
    for group in result.groups:
        if group.axes.get("pass") in (None, BOTH):
            yield group


def _slower(result: Result, rival: str) -> str:
    found, count = [], 0
    without_gradient = result.select(**{"pass": NO_GRADIENT})
    for group in (*cells(result), *without_gradient):
        for ours in (FAST, UNGROUPED):
            if ours in group.rivals and rival in group.rivals:
                count += 1
                ratio = group.ratio(ours, rival)
                if ratio.median >= 1:
                    found.append((ratio.median, f"{group.name}: {ratio}"))
    if not count:
        return NOT_MEASURED
    if not found:
        return f"nowhere, in {count} cells."
    found.sort(reverse=True)
    texts = [text for _, text in found[:SHOWN]]
    if len(found) > SHOWN:
        texts.append(f"the others are less slow, {found[-1][0]:.3f} or more (tables below)")
    return f"{len(found)} of {count} cells (ratios of time): " + "; ".join(texts) + "."


def _layers(result: Result, rival: str, tokens: int = FEW_TOKENS) -> str:
    """The range over the cells with so many tokens, and their median."""
    parts = []
    for dtype in ("bfloat16", "float32"):
        groups = result.select(suite="layer", dtype=dtype, **{"pass": BOTH})
        faster = [
            1 / group.ratio(FAST, rival).median
            for group in groups
            if rival in group.rivals and int(group.axes["tokens"]) >= tokens
        ]
        if faster:
            parts.append(
                f"{dtype}, {len(faster)} cells: {min(faster):.2f}× to {max(faster):.2f}× as fast, "
                f"median {median(faster):.2f}×"
            )
    return _told(parts)


def _few_tokens(result: Result) -> str:
    """The range, and the slowest of them."""
    few = [
        (group.ratio(FAST, STOCK), group)
        for group in result.select(suite="layer", **{"pass": BOTH})
        if int(group.axes["tokens"]) < FEW_TOKENS
    ]
    if not few:
        return NOT_MEASURED
    few.sort(key=lambda pair: -pair[0].median)
    found = [
        f"{group.axes['tokens']} x {group.axes['out']} x {group.axes['in']}, r = {group.axes['rank']}, "
        f"{group.axes['dtype']}: {ratio}"
        for ratio, group in few[:SHOWN]
    ]
    return f"{len(few)} cells, the least {few[-1][0].median:.3f}, the most: {_told(found)}"


def _host(result: Result, suite: str, call: str, forms: tuple[str, ...], most: float) -> str:
    """How many ratios are as asked, and all of them. In float32 stock's default is in the base's dtype."""
    met, found = 0, []
    for group in result.select(suite=suite, call=call):
        stock = STOCK_16 if STOCK_16 in group.rivals else STOCK
        layers = group.axes.get("layers")
        blocks = "" if layers is None else "1 block, " if layers == 1 else f"{layers} blocks, "
        for name in forms:
            if name in group.rivals:
                ratio = group.ratio(name, stock)
                met += ratio.median <= most
                form = name.removeprefix("mica.fast, ")
                found.append(f"{blocks}{group.axes['dtype']}, {form}: {ratio}")
    return f"{met} of {len(found)} as asked: {_told(found)}" if found else NOT_MEASURED


def _generate(result: Result) -> str:
    found = []
    for group in result.select(suite="generation"):
        tokens = int(group.axes["new tokens"])
        each = ", ".join(
            f"{name} {1e3 * group.rivals[name].median / tokens:.3g}" for name in (FAST, STOCK, MERGED, BARE)
        )
        found.append(f"{group.axes['model']}: {group.ratio(FAST, STOCK)}; ms a token: {each}")
    return _told(found)
