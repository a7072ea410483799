"""Every figure in the README files follows from the committed results that the pages link to."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from bench.quality.others import OTHERS
from bench.quality.recipes import OPTIONS, RECIPES, methods
from bench.quality.report import page_table
from bench.results import names
from bench.results.names import BARE, BOTH, FAST, NO_GRADIENT, STOCK, STOCK_16
from bench.results.schema import Group, Ratio, Result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MAIN, BENCH, SOLVER, KERNELS = "README.md", "bench/README.md", "mica/subspace/README.md", "kernels/README.md"
XEON = "intel-xeon-processor-amx-2-threads/2026-11-25"
OLD = "intel-xeon-processor-2-threads/2026-11-25"
OLD_EPYC = "amd-epyc-2-threads/2026-11-25"
EPYC = "amd-epyc-avx512-bf16-2-threads/2026-11-26-host"
EXPERTS = "amd-epyc-avx512-bf16-2-threads/2026-11-26-experts"
CORPUS = "amd-epyc-avx512-bf16-2-threads/2026-11-26-corpus"
PAPER = sorted(RESULTS.glob("*/*-quality-paper.json"))
UNGROUPED = f"{FAST}, ungrouped"  # mica.fast in blocks of results that also have groups of projections


@cache
def result(name: str) -> Result:
    return Result.load(RESULTS / f"{name}.json").with_both()


@cache
def raw(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def only(name: str, **axes) -> Group:
    (group,) = result(name).select(**axes)
    return group


def layers(name: str, dtype: str, *parts: str) -> list[Group]:
    return [one for one in result(name).select(suite="layer", dtype=dtype) if one.axes["pass"] in parts]


@cache
def text(page: str) -> str:
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


@cache
def table(page: str) -> dict[str, list[str]]:
    """First cell of a row -> its other cells, without bold."""
    lines = (ROOT / page).read_text(encoding="utf-8").replace("**", "").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in rows}


def shown(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def speedup(ratio: Ratio, digits: int = 2) -> str:
    low, middle, high = (f"{1 / value:.{digits}f}" for value in (ratio.high, ratio.median, ratio.low))
    return f"{middle}× ({low}–{high})"


def span(ratios: list[Ratio]) -> str:
    """Of speedups."""
    return f"{1 / max(ratios).median:.2f}× to {1 / min(ratios).median:.2f}×"


def as_stock(group: Group, name: str) -> Ratio:
    """Over the stock whose adapters have the base's dtype: by default in float32."""
    return group.ratio(name, STOCK if group.axes["dtype"] == "float32" else STOCK_16)


BLOCK = "decoder block of Llama-3.2-1B, bf16, 1024 tokens, relative to the bare frozen block"
SAVED = "saved for the backward pass of a step, SmolLM2-135M, bf16, 1024 tokens"
INITIALISED, LOADED = "`get_peft_model`, SmolLM2-135M, fp32", "`PeftModel.from_pretrained`, fp32"
LAYERS, NARROW = "22 linear layers, bf16, 256 to 8192 tokens", "5 linear layers, fp32, 256 to 4096 tokens"
HEADLINES = [INITIALISED, LOADED, BLOCK, LAYERS, SAVED]
HOST = {  # -> suite, call, form
    "a layer, forward without gradient": ("host layer", NO_GRADIENT, "{}"),
    "a layer, forward + backward": ("host layer", BOTH, "{}"),
    "a Llama block (64 / 128), forward without gradient": ("host block", NO_GRADIENT, "{}, ungrouped"),
    "the same, forward + backward": ("host block", BOTH, "{}, ungrouped"),
}
QUALITY = {"MiCA, stock PEFT": ", one seed", "LoRA, same size": " (r = 8)"}  # what the page adds to a method
COMMANDS = {  # -> its run
    "tokenisation alone": "tokenise, first start",
    "the whole command, with one step, two perplexities and saving": "adapt, first start",
    "the whole command again: the tokens are cached": "adapt, second start",
}


@cache
def measured() -> dict[str, list[str]]:
    """The table of `bench/README.md`'s first section."""

    def seconds(suite: str, decimals: tuple[int, int], digits: int) -> list[str]:
        group = only(XEON, suite=suite)
        pairs = zip((STOCK, FAST), decimals, strict=True)
        times = [f"{group.timings[name].median:.{n}f} s" for name, n in pairs]
        return [*times, speedup(group.ratio(FAST, STOCK), digits)]

    def block(model: str) -> list[str]:
        group = next(one for one in result(XEON).groups if one.name.startswith(f"block of {model},"))
        overheads = [f"{group.ratio(name, BARE).median:.2f}×" for name in (STOCK, UNGROUPED)]
        return [*overheads, speedup(group.ratio(UNGROUPED, STOCK))]

    wide, narrow = (
        [one.ratio(FAST, STOCK) for one in layers(XEON, dtype, BOTH) if one.axes["tokens"] >= 256]
        for dtype in ("bfloat16", "float32")
    )
    assert (len(wide), len(narrow)) == (22, 5)
    saved = [only(XEON, suite="step", dtype=dtype).timings for dtype in ("bfloat16", "float32")]
    (bare, stock, fast), (bare_32, stock_32, fast_32) = (
        [timings[name].facts["saved_mb"] for name in (BARE, STOCK, FAST)] for timings in saved
    )
    mb = "{:.0f} MB".format
    merge = only(XEON, suite="merge")
    slower = merge.ratio(FAST, STOCK)
    slower = f"{slower.median:.1f}× slower ({slower.low:.1f}–{slower.high:.1f})"
    changed = [f"{100 * merge.timings[name].facts['weights_changed']:.2f} %" for name in (STOCK, FAST)]
    no_copy, label_32 = "none: there is no copy to avoid", "the same, fp32, 512 tokens (bare model: "
    return {
        INITIALISED: seconds("initialisation", (1, 1), 1),
        LOADED: seconds("loading", (1, 2), 0),
        BLOCK: block("Llama-3.2-1B"),
        "the same of Llama-3.1-8B, 512 tokens": block("Llama-3.1-8B"),
        "the same of Qwen2.5-0.5B, 1024 tokens": block("Qwen2.5-0.5B"),
        "the same of GPT-2, 1024 tokens": block("GPT-2"),
        LAYERS: ["", "", f"{span(wide)}, median {median(1 / one.median for one in wide):.2f}×"],
        NARROW: ["", "", span(narrow)],
        f"{SAVED} (bare model: {mb(bare)})": [mb(stock), mb(fast), f"{mb(stock - fast)} less"],
        f"{label_32}{mb(bare_32)})": [mb(stock_32), mb(fast_32), no_copy],
        "merge + unmerge, bf16": ["", "", f"{slower}: it is exact"],
        "weights changed by merge + unmerge": [*changed, ""],
    }


def host(suite: str, call: str, form: str) -> Iterator[str]:
    """The ratios of a path in float32 and bfloat16."""
    axes = {"layers": 1} if suite == "host block" else {}
    groups = [only(EPYC, suite=suite, call=call, dtype=one, **axes) for one in ("float32", "bfloat16")]
    endings = "", ", adapters in the base dtype" if suite == "host layer" else ""
    for path in (names.PYTORCH, names.KERNELS):
        ratios = map(as_stock, groups, (form.format(path) + ending for ending in endings))
        yield " / ".join(f"{ratio.median:.2f}" for ratio in ratios)


def experts() -> Iterator[tuple[str, list[str]]]:
    def row(group: Group, other: str, digits: int = 2) -> list[str]:
        times = [f"{group.timings[name].median:.{digits}f} s" for name in (other, FAST)]
        return [*times, shown(group.ratio(FAST, other))]

    def memory(group: Group, fact: str) -> list[str]:
        values = [group.timings[name].facts[fact] for name in (names.LORA, FAST)]
        return [*(f"{value:.0f} MB" for value in values), f"{values[1] / values[0]:.2f}"]

    for out, within in ((2048, 1024), (1024, 512)):
        group = only(EXPERTS, suite="experts", out=out)
        yield f"step, experts of {out} and {within}", row(group, names.LORA)
        yield f"memory it adds at its peak, {out} and {within}", memory(group, "peak_mb")
    wide = only(EXPERTS, suite="experts", out=2048)
    yield "saved for its backward pass, 2048 and 1024", memory(wide, "saved_mb")
    yield "initialisation", row(only(EXPERTS, suite="experts init"), names.SVD, 1)


def quality(row: str) -> list[str]:
    """Of the report, which the code that made the result wrote beside it."""
    report = (RESULTS / f"{XEON}-quality.md").read_text(encoding="utf-8")
    learned, forgotten, cost = (
        next(line for line in section.splitlines() if line.startswith(row)).replace(" to ", "–").split(" | ")
        for section in (report.partition(f"### {title}")[2] for title in ("Learned", "Forgotten", "Cost"))
    )
    rounded = re.sub(r"\d+\.\d", lambda number: f"{float(number[0]):.0f}", learned[2])
    facts = re.sub(r"^\d+", r"\g<0> %", rounded)
    return [f"{int(cost[2].replace(',', '')) / 1e6:.1f} M", facts, learned[4], forgotten[2], f"{cost[6]} s"]


def corpus(name: str) -> list[str]:
    run = raw(CORPUS)[name]
    assert run["status"] == 0
    own, children = (f"{run[key] / 2**30:.2f} GiB" for key in ("peak_bytes", "peak_bytes_of_children"))
    return [f"{run['seconds']:.0f} s", own, "" if children[0] == "0" else children]


def recipe(name: str) -> list[str]:
    one, targets = RECIPES[name], RECIPES[name].target_modules
    compared = [method for method in methods(OPTIONS["rank"][0]) if method.recipe == name]
    ranks = [str(method.rank) for method in compared if method.rank]
    numbers = [f"{number:g}" for number in (one.weight_decay, one.dropout, one.max_grad_norm)]
    shown = "all linear" if targets == "all-linear" else ", ".join(targets)
    return [shown, " / ".join(ranks), {1: "r", 2: "2r"}[one.scaling], one.scheduler, *numbers]


def rows() -> Iterator[tuple[str, str, list[str]]]:
    """Page, first cell of a row, its other cells."""
    yield from ((BENCH, *row) for row in measured().items())
    for label in HEADLINES:  # README's are those of the benchmarks' page
        (cells,) = (cells for name, cells in measured().items() if name.startswith(label))
        yield MAIN, label, cells
    yield from ((BENCH, label, [*host(*what)]) for label, what in HOST.items())
    for group in result("amd-epyc-as-avx2-2-threads/2026-11-26-dtype").groups:
        label = " x ".join(str(group.axes[name]) for name in ("tokens", "out", "in"))
        dtypes = "bfloat16", "float16"
        yield BENCH, label, [shown(group.ratio(f"mica.fast, {dtype}", names.FLOAT32)) for dtype in dtypes]
    for group in result(f"{OLD}-subspace").groups:
        (old,) = (one for one in result(f"{OLD_EPYC}-subspace").groups if one.name == group.name)
        ratios = [group.ratio(f"minor_subspace, r = {rank}", names.SVD) for rank in (16, 64, 128)]
        ratios.append(old.ratio("minor_subspace", names.SVD))
        label = group.name.removeprefix("minor subspace, ")
        label += " (embedding)" if label == "576 x 49152" else ""
        yield SOLVER, label, [f"{1 / one.median:.1f}×" for one in ratios]
    yield from ((BENCH, *row) for row in experts())
    for shape in raw("modelled/h100")["shapes"]:
        forms = ("split", "fused", "stock PEFT, bf16 adapters", "stock PEFT, default (fp32 adapters)")
        percents = [shape["forms"][form]["percent"] for form in forms]
        cells = [f"{one['forward']:.0f} / {one['backward']:.0f} %" for one in percents]
        yield KERNELS, " x ".join(str(shape[side]) for side in ("m", "n", "k")), cells
    for method in ("MiCA, mica.fast", "LoRA, same rank", "full fine-tuning", *QUALITY):
        yield BENCH, method + QUALITY.get(method, ""), quality(method)
    yield from ((BENCH, label, corpus(name)) for label, name in COMMANDS.items())
    for label, name in (("`paper` (arXiv 2604.01694)", "paper"), ("`all-linear`", "all-linear")):
        yield BENCH, label, recipe(name)


@pytest.mark.parametrize(("page", "label", "cells"), [*rows()])
def test_tables(page, label, cells):
    assert table(page)[label] == cells


def test_every_headline_figure_is_checked():
    found = [label for label, cells in table(MAIN).items() if re.search(r"\d+ MB|\d×", " ".join(cells))]
    assert found == HEADLINES


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_model_quality_by_the_papers_recipe(path):
    """The table is `bench.quality.report`'s, and the page links to the report and the raw result."""
    page = (ROOT / BENCH).read_text(encoding="utf-8")
    assert page_table(json.loads(path.read_text(encoding="utf-8"))) in page
    for file in (path, path.with_suffix(".md")):
        assert f"({file.relative_to(ROOT / 'bench')})" in page


def step(name: str) -> Group:
    (group,) = (one for one in result(name).groups if one.name == "training step, bfloat16")
    return group


def where_it_is_not_faster() -> Iterator[tuple[str, str]]:
    merge = only(XEON, suite="merge").ratio(FAST, STOCK).median
    yield MAIN, f"fp32 layers gain {measured()[NARROW][-1]} and save no memory"
    yield MAIN, f"Merge + unmerge is {merge:.1f}× slower"
    forms = [f"{name}, ungrouped" for name in (names.PYTORCH, names.KERNELS)]
    blocks = [as_stock(one, form).median for one in result(EPYC).select(suite="host block") for form in forms]
    yield MAIN, f"Blocks of tiny tensors are up to {max(blocks):.2f}× slower"
    narrow, wide = (layers(EPYC, dtype, BOTH, NO_GRADIENT) for dtype in ("bfloat16", "float32"))
    yield BENCH, f"[{len(narrow + wide)} cells]"
    slow = [one for one in narrow + wide if one.ratio(FAST, STOCK).median > 1.05]
    assert {(one.axes["dtype"], one.axes["out"], one.axes["in"]) for one in slow} == {("bfloat16", 576, 576)}
    ratios = {(one.axes["tokens"], one.axes["rank"]): one.ratio(FAST, STOCK) for one in slow}
    first, second, third = (ratios.pop(cell) for cell in ((1, 64), (1, 128), (32, 128)))
    assert not ratios
    few = f"1 token at r = 64 and 128 ({first.median:.2f} and {second.median:.2f} times its time)"
    more = f"32 tokens at r = 128 ({third.median:.2f}, interval {third.low:.2f}–{third.high:.2f})"
    yield BENCH, f"Three were more than 5 % slower than stock PEFT, all bf16, 576 x 576: {few}, and {more}."
    many = [[one.ratio(FAST, STOCK) for one in part if one.axes["tokens"] >= 256] for part in (narrow, wide)]
    yield BENCH, f"From 256 tokens on all cells were faster, bf16 {span(many[0])}, fp32 {span(many[1])}."
    told = [one.ratio(FAST, STOCK_16).median for one in narrow]
    yield BENCH, f"between {1 / min(told):.2f}× faster and {max(told):.2f}× slower"
    yield BENCH, f"at the median {1 / median(told):.2f}× faster"
    there, xeon = (
        max(
            group.ratio(FAST, names.ATEN).median
            for dtype in ("bfloat16", "float32")
            for group in layers(name, dtype, BOTH, NO_GRADIENT)
            if names.ATEN in group.timings
        )
        for name in (EPYC, XEON)
    )
    yield BENCH, f"up to {there:.2f}× faster there (8 tokens), and up to {xeon:.2f}× on the Xeon"


def sentences() -> Iterator[tuple[str, str]]:
    """Page, words with figures that it has."""
    yield from where_it_is_not_faster()
    for name in (f"{XEON}-step", f"{XEON}-before", XEON):
        ratio = only(name, suite="step", dtype="bfloat16").ratio(FAST, STOCK)
        yield BENCH, speedup(ratio)
        yield MAIN, f"{1 / ratio.median:.2f}×"
    ratio = shown(only(EPYC, suite="generation").ratio(FAST, STOCK))
    yield BENCH, ratio.replace(" (", " times stock PEFT's time (")
    for name, last_but in ((OLD, " and "), ("intel-xeon-processor-1-threads/2026-11-25-subspace", ", ")):
        groups = [one for one in result(name).groups if one.name.startswith("minor subspace")]
        *most, last = (f"{1 / one.ratio('minor_subspace, r = 16', names.SVD).median:.1f}" for one in groups)
        assert len(most) == 5
        yield SOLVER, f"{', '.join(most)}{last_but}{last}"
    bare = [only(EXPERTS, suite="experts", out=out).timings[BARE].median for out in (2048, 1024)]
    yield BENCH, f"take {bare[0]:.2f} and {bare[1]:.2f} s"
    ratio = only(EXPERTS, suite="experts", out=2048).ratio(FAST, names.LORA).median
    yield MAIN, f"[{ratio:.2f} times the time](bench/README.md#experts)"
    old, epyc, last = (step(name).ratio(FAST, STOCK).median for name in (OLD, OLD_EPYC, f"{OLD}-step"))
    yield BENCH, f"a bf16 step was {1 / old:.2f}× faster than stock PEFT's on"
    yield BENCH, f"{1 / epyc:.2f}× on [an AMD EPYC]"
    yield BENCH, f"and {1 / last:.2f}× on"
    yield BENCH, f"{step(f'{OLD}-step').ratio(STOCK, BARE).median:.2f} times the bare step"
    (quantised,) = result(f"{OLD}-quantised").groups
    yield BENCH, shown(quantised.overhead(FAST, names.LORA)).replace(" (", " of plain PEFT LoRA's (")
    (shared,) = (one for one in result(OLD).groups if "2 processes" in one.timings)
    yield BENCH, f"{shared.ratio('2 processes', '1 process').median:.2f} times the time of one"
    tokens = raw(CORPUS)["adapt, first start"]["output"].partition(" tokens")[0].replace(",", "")
    yield BENCH, f"({raw(CORPUS)['documents']:,} documents, {int(tokens) / 1e6:.0f} M tokens of SmolLM2)"
    # what the page says of a run of model quality are the defaults of the command
    assert [OPTIONS[name][0] for name in ("epochs", "tries", "seeds", "rank")] == [8, 7, 3, 16]
    yield BENCH, "Eight epochs of eight steps."
    yield BENCH, "(at most seven), and three seeds there"


@pytest.mark.parametrize(("page", "words"), [*sentences()])
def test_words(page, words):
    assert words in text(page)


def test_what_others_measured():
    said = " ".join(" ".join(row) for row in OTHERS)
    for figure in ("5.9", "43.1", "47.8", "3.7"):
        assert figure in said
        assert figure in text(BENCH).partition("What others measured")[2]
