"""``python -m bench.pages``: writes the tables of the README files from committed results.

A table stands below a line ``<!-- table: NAME FILE ... -->``, up to the first line that is no row. `TABLES`
has its function, which is given those files of ``bench/results``, without their ending, and yields the header
and the rows. So a page says itself where its figures are from: after a new run its files are named there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

from bench.model import experts as stacks
from bench.model import roofline
from bench.quality import plots
from bench.quality.energy import profiles, rows
from bench.quality.recipes import METHODS, RECIPES
from bench.quality.report import RIGHT, at_equal_forgetting
from bench.report.frame import ONE_PROCESS
from bench.report.markdown import markdown_table
from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.names import BARE, BOTH, FAST, NO_GRADIENT, STOCK, STOCK_16
from bench.results.schema import Result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "bench/README.md", "mica/subspace/README.md", "kernels/README.md")
TABLE = re.compile(r"(<!-- table: ([\w-]+)((?: [\w/-]+)*) -->\n)((?:\|.*\n)*)")
Rows = Iterator[list[str]]


@cache
def result(name: str) -> Result:
    return Result.load(RESULTS / f"{name}.json").with_both()


@cache
def raw(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def sources(table: str) -> list[str]:
    """The files that the pages name for a table."""
    for page in PAGES:
        for found in TABLE.finditer((ROOT / page).read_text(encoding="utf-8")):
            if found[2] == table:
                return found[3].split()
    raise KeyError(table)


def only(name: str, start: str = "", **axes: str | int) -> Group:
    """The group with these axes whose name starts so."""
    (group,) = (one for one in result(name).select(**axes) if one.name.startswith(start))
    return group


def layers(name: str, dtype: str, *passes: str) -> list[Group]:
    return [one for one in result(name).select(suite="layer", dtype=dtype) if one.axes["pass"] in passes]


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


def measured(run: str, of_adapter: str) -> Rows:
    yield ["", "stock PEFT", "mica.fast", "speedup"]
    for label, suite, decimals, digits in (
        ("`get_peft_model`, SmolLM2-135M, fp32", "initialisation", (1, 1), 1),
        ("`PeftModel.from_pretrained`, fp32", "loading", (1, 2), 0),
    ):
        group = only(of_adapter, suite=suite)
        pairs = zip((STOCK, FAST), decimals, strict=True)
        times = [f"{group.timings[name].median:.{n}f} s" for name, n in pairs]
        yield [label, *times, speedup(group.ratio(FAST, STOCK), digits)]
    label = "decoder block of {}, bf16, {} tokens, relative to the bare frozen block"
    for group in result(run).select(suite="block"):
        overheads = [f"{group.ratio(name, BARE).median:.2f}×" for name in (STOCK, FAST)]
        named = label.format(group.axes["model"], group.axes["tokens"])
        yield [named, *overheads, speedup(group.ratio(FAST, STOCK))]
        label = "the same of {}, {} tokens"
    for dtype, short in (("bfloat16", "bf16"), ("float32", "fp32")):
        cells = [one for one in layers(run, dtype, BOTH) if one.axes["tokens"] >= 256]
        ratios = [one.ratio(FAST, STOCK) for one in cells]
        middle = f", median {median(1 / one.median for one in ratios):.2f}×"
        most = max(one.axes["tokens"] for one in cells)
        yield [f"{len(ratios)} linear layers, {short}, 256 to {most} tokens", "", "", span(ratios) + middle]
    label = "saved for the backward pass of a step, SmolLM2-135M, {}, {} tokens"
    for group in result(run).select(suite="step"):
        short = {"bfloat16": "bf16", "float32": "fp32"}[group.axes["dtype"]]
        bare, stock, fast = (group.timings[name].facts["saved_mb"] for name in (BARE, STOCK, FAST))
        less = f"{stock - fast:.0f} MB less" if stock - fast >= 1 else "**none**: there is no copy to avoid"
        what = label.format(
            f"{short}, {group.axes['how']}" if "how" in group.axes else short, group.axes["tokens"]
        )
        yield [f"{what} (bare model: {bare:.0f} MB)", f"{stock:.0f} MB", f"{fast:.0f} MB", less]
        label = "the same, {}, {} tokens"
    merge = only(of_adapter, suite="merge")
    slower = merge.ratio(FAST, STOCK)
    slower = f"**{slower.median:.1f}× slower** ({slower.low:.1f}–{slower.high:.1f}): it is exact"
    yield ["merge + unmerge, bf16", "", "", slower]
    changed = [f"{100 * merge.timings[name].facts['weights_changed']:.2f} %" for name in (STOCK, FAST)]
    yield ["weights changed by merge + unmerge", *changed, ""]


def headline(run: str, of_adapter: str) -> Rows:
    """README's rows are those of the benchmarks' page."""
    header, *rows = measured(run, of_adapter)
    yield header
    for label, *cells in rows:
        if label.startswith(("`", "decoder block", "saved")) or "linear layers, bf16" in label:
            yield [label.partition(" (bare model")[0], *cells]


def bf16_steps(name: str) -> list[Group]:
    """That under autocast, if it is there, is the last."""
    pattern = r"training step( of [^,]*)?, (.*, )?bfloat16(, .*)?"
    return [one for one in result(name).groups if re.fullmatch(pattern, one.name)]


def runs() -> list[str]:
    """All committed runs of the suites, the latest first."""
    files = [str(file.relative_to(RESULTS).with_suffix("")) for file in RESULTS.glob("*/*.json")]
    timed = [name for name in files if "benchmarks" in raw(name)]
    return sorted(timed, key=lambda name: result(name).machine["datetime"], reverse=True)


def steps() -> Rows:
    yield ["", "stock PEFT ÷ bare", "mica.fast ÷ bare", "speedup"]
    for name in runs():
        kind = "md" if (RESULTS / f"{name}.md").exists() else "json"
        for group in bf16_steps(name):
            ratios = [f"{group.ratio(one, BARE).median:.2f}×" for one in (STOCK, FAST)]
            how = f", under {group.axes['how']}" if "how" in group.axes else ""
            where = f"[{described(result(name).machine)}](results/{name}.{kind}){how}"
            yield [where, *ratios, speedup(group.ratio(FAST, STOCK))]


def described(machine: dict) -> str:
    """As "AMD EPYC, avx512-bf16, 2026-11-27"; of the earliest runs the instructions are not known."""
    cpu = re.sub(r"\([A-Z]+\)", "", machine["cpu"])
    words = [cpu, machine.get("bf16 instructions"), machine["datetime"][:10]]
    return ", ".join(filter(None, words))


def layers_compared(run: str) -> Rows:
    """Of all cells of the layer suite, by what they are compared with."""
    yield ["against", "layers", "cells", "speedup", "median", "more than 5 % slower"]
    for baseline, title in (
        (STOCK, "stock PEFT"),
        (STOCK_16, "stock PEFT with bf16 adapters"),
        (names.ATEN, "a control in plain PyTorch, dA rounded"),
    ):
        for dtype in ("bfloat16", "float32"):
            for what, is_few in (("from 256 tokens", False), ("fewer tokens", True)):
                cells = [
                    (one.ratio(FAST, baseline), one.axes)
                    for one in layers(run, dtype, BOTH, NO_GRADIENT)
                    if baseline in one.timings and (one.axes["tokens"] < 256) == is_few
                ]
                if cells:
                    ratios = [ratio for ratio, _ in cells]
                    row = [title, f"{dtype}, {what}", str(len(cells)), span(ratios)]
                    middle = f"{median(1 / one.median for one in ratios):.2f}×"
                    yield [*row, middle, _slower([one for one in cells if one[0].median > 1.05])]


def _slower(cells: list[tuple[Ratio, dict]]) -> str:
    """How many, and the worst."""
    if not cells:
        return "none"
    ratio, axes = max(cells, key=lambda one: one[0].median)
    where = "{out} x {in}, tokens: {tokens}, r = {rank}".format(**axes)
    return f"{len(cells)}; at most {shown(ratio)} times its time: {where}"


def host(run: str) -> Rows:
    columns = {
        "PyTorch form": names.PYTORCH,
        "kernels": names.KERNELS,
        "kernels, in a process group": names.IN_GROUP,
        "kernels, where they run by default (fp32)": names.BY_DEFAULT,
    }
    yield ["fp32 / bf16 / bf16 under autocast", *columns]
    for label, suite, call in (
        ("a layer, forward without gradient", "host layer", NO_GRADIENT),
        ("a layer, forward + backward", "host layer", BOTH),
        ("a Llama block (64 / 128), forward without gradient", "host block", NO_GRADIENT),
        ("the same, forward + backward", "host block", BOTH),
    ):
        groups = [*result(run).select(suite=suite, call=call)]
        cells = []
        for name in columns.values():
            ratios = [f"{as_stock(group, name).median:.2f}" for group in groups if name in group.timings]
            cells.append(" / ".join(ratios))
        yield [label, *cells]


def dtypes(run: str) -> Rows:
    yield ["tokens x out x in", "bf16", "fp16"]
    for group in result(run).groups:
        label = " x ".join(str(group.axes[name]) for name in ("tokens", "out", "in"))
        ratios = [group.ratio(f"{FAST}, {dtype}", names.FLOAT32) for dtype in ("bfloat16", "float16")]
        yield [label, *map(shown, ratios)]


def others(generation: str, over_nf4: str, two_processes: str) -> Rows:
    yield ["", "on", "ratio of times"]
    generated, quantised = only(generation, suite="generation"), only(over_nf4)
    shared = only(two_processes, "get_peft_model, float32, processes")
    ratio = shown(generated.ratio(FAST, STOCK))
    yield ["`generate()` of SmolLM2-135M, unmerged ÷ stock PEFT", "AMD EPYC", ratio]
    ratio = shown(quantised.overhead(FAST, names.LORA))
    yield ["step over nf4: overhead ÷ that of PEFT's LoRA", f"[Xeon](results/{over_nf4}.md)", ratio]
    ratio = shown(shared.ratio("2 processes", ONE_PROCESS))
    label = "initialisation by two processes of one thread ÷ by one"
    yield [label, f"[older Xeon](results/{two_processes}.md)", ratio]


def experts(run: str) -> Rows:
    def row(label: str, group: Group, other: str, digits: int = 2) -> list[str]:
        times = [f"{group.timings[name].median:.{digits}f} s" for name in (other, FAST)]
        return [label, *times, shown(group.ratio(FAST, other))]

    yield ["", "PEFT LoRA, or SVDs", "mica.fast", "ratio"]
    for out, within in ((2048, 1024), (1024, 512)):
        group, sizes = only(run, suite="experts", out=out), f"{out} and {within}"
        label = f"step, experts of {sizes} (bare: {group.timings[BARE].median:.2f} s)"
        yield row(label, group, names.LORA)
        for fact, label in (
            ("peak_mb", "memory it adds at its peak"),
            ("saved_mb", "saved for its backward pass"),
        ):
            values = [group.timings[name].facts[fact] for name in (names.LORA, FAST)]
            mb = [f"{value:.0f} MB" for value in values]
            yield [f"{label}, {sizes}", *mb, f"{values[1] / values[0]:.2f}"]
    yield row("initialisation", only(run, suite="experts init"), names.SVD, 1)


def corpus(run: str) -> Rows:
    yield ["", "time", "peak of the process", "peak of its workers"]
    for label, name in (
        ("tokenisation alone", "tokenise, first start"),
        ("the whole command, with one step, two perplexities and saving", "adapt, first start"),
        ("the whole command again: the tokens are cached", "adapt, second start"),
    ):
        command = raw(run)[name]
        assert command["status"] == 0
        own, children = (
            f"{command[key] / 2**30:.2f} GiB" for key in ("peak_bytes", "peak_bytes_of_children")
        )
        yield [label, f"{command['seconds']:.0f} s", own, "" if children[0] == "0" else children]


def recipes() -> Rows:
    header = ["recipe", "layers", "rank of MiCA / LoRA", "alpha", "schedule", "weight decay"]
    yield [*header, "dropout", "clipping"]
    for label, name in (("`paper` (arXiv 2604.01694)", "paper"), ("`all-linear`", "all-linear")):
        one, targets = RECIPES[name], RECIPES[name].target_modules
        ranks = " / ".join(
            ", ".join(str(one.rank) for one in METHODS if (one.recipe, one.kind) == (name, kind))
            for kind in ("mica", "lora")
        )
        where = "all linear" if targets == "all-linear" else ", ".join(targets)
        numbers = [f"{number:g}" for number in (one.weight_decay, one.dropout, one.max_grad_norm)]
        yield [label, where, ranks, {1: "r", 2: "2r"}[one.scaling], one.scheduler, *numbers]


def quality(run: str) -> str:
    return at_equal_forgetting(raw(run), RIGHT)


def energy(run: str) -> list[list[str]]:
    return rows(raw(run))


def subspaces(run: str, previous: str, one_thread: str, epyc: str) -> Rows:
    ours = "minor_subspace, r = {}".format
    runs = {"previous run, r = 16": previous, "one thread, r = 16": one_thread, "AMD EPYC, r = 16": epyc}
    yield ["out x in", *(f"r = {rank}" for rank in (16, 64, 128)), *runs]
    for group in result(run).groups:
        ratios = [group.ratio(ours(rank), names.SVD) for rank in (16, 64, 128)]
        for name in runs.values():
            other = only(name, group.name)
            solver = ours(16) if ours(16) in other.timings else "minor_subspace"
            ratios.append(other.ratio(solver, names.SVD))
        label = group.name.removeprefix("minor subspace, ")
        label += " (embedding)" if label == "576 x 49152" else ""
        yield [label, *(f"{1 / one.median:.1f}×" for one in ratios)]


def modelled() -> Rows:
    yield [
        "tokens x out x in",
        "mica, split",
        "mica, fused",
        "stock PEFT, bf16 adapters",
        "stock PEFT, default",
    ]
    for shape in roofline.SHAPES:
        layer = roofline.Layer(*shape, roofline.RANK, roofline.H100.target)
        forms = roofline.SPLIT, roofline.FUSED, roofline.STOCK_16, roofline.STOCK
        percents = [roofline.percent(layer, roofline.H100, form) for form in forms]
        cells = [f"{one['forward']:.0f} / {one['backward']:.0f} %" for one in percents]
        yield [" x ".join(map(str, shape)), *cells]


def forms() -> Rows:
    """Launches and bytes of a layer of 8192 tokens, 4096 x 4096: forward, backward, by rank."""
    ranks = (16, 128)
    yield ["form", *(f"rank {rank}, {part}" for rank in ranks for part in ("forward", "backward"))]
    for form in roofline.FORMS:
        costs = [roofline.FORMS[form](roofline.Layer(8192, 4096, 4096, rank, "sm_90")) for rank in ranks]
        parts = [kernels for cost in costs for kernels in cost[:2]]
        moved = [sum(kernel.bytes + kernel.partials for kernel in kernels) / 1e6 for kernels in parts]
        yield [form, *(f"{len(p)}: {size:.0f} MB" for p, size in zip(parts, moved, strict=True))]


def stack() -> Rows:
    yield ["form", "forward", "", "", "both", "", "", "kept"]
    yield from stacks.table()


MADE = (
    measured,
    headline,
    steps,
    layers_compared,
    host,
    dtypes,
    others,
    experts,
    corpus,
    recipes,
    quality,
    energy,
)
MADE += (subspaces, modelled, forms, stack)
TABLES = {one.__name__.replace("_", "-"): one for one in MADE}


def table(name: str, *files: str) -> str:
    made = TABLES[name](*files)
    if not isinstance(made, str):
        header, *rows = made
        made = markdown_table(header, rows)
    return made.replace("|  |", "| |").replace("|  |", "| |") + "\n"


def filled(page: str) -> str:
    """The text of a page with the tables that follow from the results."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return TABLE.sub(lambda found: found[1] + table(found[2], *found[3].split()), text)


def main() -> None:
    (run,) = sources("energy")
    plots.energy(profiles(raw(run)), RESULTS / f"{run}.png")
    for page in PAGES:
        (ROOT / page).write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()
