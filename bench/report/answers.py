"""The questions that a run answers, each in one line with its figure."""

from __future__ import annotations

from statistics import median

from bench.report.cells import by_clock, clocks, having, whole
from bench.results import names
from bench.results.names import BARE, BOTH, FAST, STOCK, STOCK_16, WALL
from bench.results.schema import Ratio, Result

SHOWN = 6
FEW_TOKENS = 256  # below, the cost of calls dominates on a CPU

HOST_RATIO = "mica.fast ÷ stock PEFT with adapters in the base dtype"
_LAYER_FORMS = (names.PYTORCH, names.PYTORCH_16, names.KERNELS, names.KERNELS_16)
_BLOCK_FORMS = (names.PYTORCH_GROUPED, names.KERNELS_GROUPED)
# (title, suite, call, forms of mica.fast, ratio that is asked for)
HOST = (
    ("Host time of a layer", "host layer", BOTH, _LAYER_FORMS, 0.8),
    ("Host time of a layer", "host layer", names.NO_GRADIENT, _LAYER_FORMS, 1.0),
    ("Host time of a decoder block, grouped", "host block", BOTH, _BLOCK_FORMS, 0.7),
)
GENERATE_AT_MOST = 1.0
# (than what it is not faster, what else is to be said of that, its name)
SLOWER = (
    ("stock PEFT", "", STOCK),
    ("stock PEFT told to keep adapters in 16 bit", " (not its default)", STOCK_16),
    ("that under `torch.compile`", "", names.COMPILED),
    ("the control", ", plain PyTorch with less precise dA", names.ATEN),
)
NOT_MEASURED = "not measured in this run."


def answers(result: Result) -> list[str]:
    """Markdown lines; a question that this run cannot answer is said to be open.

    On an accelerator they are of the wall clock; what is asked of many cells is asked by device time as well.
    """
    wall = by_clock(result, WALL)
    found = {
        "**Initialisation**": _once(wall, "initialisation"),
        "**A training step**": _step(wall),
        "**Loading an adapter**": _once(wall, "loading"),
        "**Memory**": _memory(wall),
    }
    for clock in (WALL, names.DEVICE_TIME) if clocks(result) else (WALL,):
        part, of = by_clock(result, clock), f", {clock}" if clocks(result) else ""
        for title, more, implementation in SLOWER:
            found[f"**Where it is not faster than {title}**{of}{more}"] = _slower(part, implementation)
        many, few = range(FEW_TOKENS, 2**62), range(FEW_TOKENS)
        found |= {
            f"**Layers with {FEW_TOKENS} tokens or more**{of}, against stock PEFT": _layers(
                part, STOCK, many
            ),
            f"**Layers with fewer tokens**{of}, against stock PEFT": _layers(part, STOCK, few),
            f"**All layers**{of}, against stock PEFT with adapters in 16 bit": _layers(part, STOCK_16),
        }
    for title, suite, call, forms, most in HOST:
        question = f"**{title}**, {call}, {HOST_RATIO} (asked: at most {most})"
        found[question] = _host(wall, suite, call, forms, most)
    question = f"**generate()**, adapter unmerged, mica.fast ÷ stock PEFT (asked: at most {GENERATE_AT_MOST})"
    found[question] = _generate(wall)
    return [f"- {question}: {answer}" for question, answer in found.items()]


def _inverse(ratio: Ratio) -> str:
    """As "1.42× (1.38–1.47)", how many times as fast."""
    low, high = (1 / ratio.high if ratio.high else 0.0), (1 / ratio.low if ratio.low else float("inf"))
    return str(Ratio(1 / ratio.median, low, high)).replace(" ", "× ", 1)


def _told(parts: list[str]) -> str:
    return "; ".join(parts) + "." if parts else NOT_MEASURED


def _once(result: Result, suite: str) -> str:
    """Of what happens to an adapter once; seconds."""
    parts = []
    for group in having({FAST, STOCK}, result.select(suite=suite)):
        seconds = " → ".join(f"{group.timings[name].median:.3g} s" for name in (STOCK, FAST))
        what = group.axes.get("model", group.name)
        parts.append(f"{_inverse(group.ratio(FAST, STOCK))} as fast as stock PEFT for {what} ({seconds})")
    return _told(parts)


def _step(result: Result) -> str:
    parts = []
    for group in having({FAST, STOCK}, result.select(suite="step")):
        text = f"{group.name}: {_inverse(group.ratio(FAST, STOCK))} as fast"
        if BARE in group.timings:
            ours, stock = (group.ratio(name, BARE).median for name in (FAST, STOCK))
            text += f", {ours:.2f} times the {BARE}, {STOCK} {stock:.2f} times"
        parts.append(text)
    return _told(parts)


def _memory(result: Result) -> str:
    parts = []
    for group in having({STOCK, FAST, BARE}, result.select(suite="step")):
        stock, ours, bare = (group.timings[name].facts.get("saved_mb") for name in (STOCK, FAST, BARE))
        if None not in (stock, ours, bare):
            parts.append(
                f"{group.name}: {stock - ours:.0f} MB less are saved for the backward "
                f"({stock:.0f} → {ours:.0f} MB, the bare model {bare:.0f} MB)"
            )
    return _told(parts)


def _slower(result: Result, implementation: str) -> str:
    cells = [*whole(result), *result.select(**{"pass": names.NO_GRADIENT})]
    found = [
        (group.ratio(ours, implementation), group.name)
        for ours in (FAST, names.UNGROUPED)
        for group in having({ours, implementation}, cells)
    ]
    slower = sorted((one for one in found if one[0].median >= 1), reverse=True)
    if not slower:
        return f"nowhere, in {len(found)} cells." if found else NOT_MEASURED
    texts = [f"{name}: {ratio}" for ratio, name in slower[:SHOWN]]
    if len(slower) > SHOWN:
        texts.append(f"the others are less slow, {slower[-1][0].median:.3f} or more (tables below)")
    return f"{len(slower)} of {len(found)} cells (ratios of time): {_told(texts)}"


def _layers(result: Result, implementation: str, tokens: range = range(2**62)) -> str:
    """The range over the cells with so many tokens, and their median."""
    parts = []
    for dtype in ("bfloat16", "float32"):
        faster = [
            1 / group.ratio(FAST, implementation).median
            for group in having(
                {FAST, implementation}, result.select(suite="layer", dtype=dtype, **{"pass": BOTH})
            )
            if group.axes["tokens"] in tokens
        ]
        if faster:
            parts.append(
                f"{dtype}, {len(faster)} cells: {min(faster):.2f}× to {max(faster):.2f}× as fast, "
                f"median {median(faster):.2f}×"
            )
    return _told(parts)


def _host(result: Result, suite: str, call: str, forms: tuple[str, ...], most: float) -> str:
    """How many ratios are as asked, and all of them. In float32 stock's default is in the base's dtype."""
    met, found = 0, []
    for group in result.select(suite=suite, call=call):
        stock = STOCK if group.axes["dtype"] == "float32" else STOCK_16
        layers = group.axes.get("layers")
        blocks = "" if layers is None else "1 block, " if layers == 1 else f"{layers} blocks, "
        for name in forms if stock in group.timings else ():
            if name not in group.timings:
                continue
            ratio = group.ratio(name, stock)
            met += ratio.median <= most
            found.append(f"{blocks}{group.axes['dtype']}, {name.removeprefix('mica.fast, ')}: {ratio}")
    return f"{met} of {len(found)} as asked: {_told(found)}" if found else NOT_MEASURED


def _generate(result: Result) -> str:
    found = []
    for group in having({FAST, STOCK}, result.select(suite="generation")):
        tokens = int(group.axes["new tokens"])
        shown = [name for name in (FAST, STOCK, names.MERGED, BARE) if name in group.timings]
        each = ", ".join(f"{name} {1e3 * group.timings[name].median / tokens:.3g}" for name in shown)
        found.append(f"{group.axes['model']}: {group.ratio(FAST, STOCK)}; ms a token: {each}")
    return _told(found)
