"""``python -m bench.pages``: writes the tables, and what is said of GPUs, of the README files from results.

A table stands below a line ``<!-- table: NAME FILE ... -->``, up to the first line that is no row. `TABLES`
has its function, which is given those files of ``bench/results``, without their ending, and returns the
header and the rows. So a page says itself where its figures are from: after a new run its files are named
there. What is said of GPUs stands between ``<!-- text: NAME -->`` and ``<!-- end -->`` (`bench.on_a_gpu`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median

from bench import on_a_gpu
from bench.report.words import Row, markdown, shown, shows_no_difference, speedup
from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.names import (
    BARE,
    BOTH,
    EIGH,
    FAST,
    FAST_LORA,
    FAST_NORMS,
    LORA,
    MICA,
    NO_GRADIENT,
    PLAIN_LORA,
    STOCK,
    best_stock,
)
from bench.results.schema import Result
from bench.results.throughput import number
from mica.cli.fits import GIB, tokens_that_fit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "bench/README.md", "kernels/README.md", "mica/subspace/README.md")
TABLE = re.compile(r"(<!-- table: ([\w-]+)((?: [\w/-]+)*) -->\n)((?:\|.*\n)*)")
TEXT = re.compile(r"(<!-- text: ([\w-]+) -->)(.*?)(<!-- end -->)", re.DOTALL)
SHORT = {"bfloat16": "bf16", "float32": "fp32"}
FEW = 256  # tokens; where products of a layer begin to take most of its time
DROPOUT = 0.05
SOLVED_RANKS = (16, 64, 128)
PAPER = "paper's recipe"
WITHOUT = "without adapter"
FITS = ("PEFT's default", "PEFT's best setting", "here", "here, with norms")
DEVICES = (24, 40, 80)  # GiB


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


def layers(name: str, dtype: str, *passes: str, dropout: float = 0.0, adapter: str = MICA) -> list[Group]:
    found = []
    for one in of_adapter(name, adapter, suite="layer", dtype=dtype):
        if one.axes["pass"] in passes and one.axes.get("dropout", 0.0) == dropout:
            found.append(one)
    return found


def of_adapter(name: str, adapter: str, **axes: str | int) -> list[Group]:
    return [one for one in result(name).select(**axes) if one.axes.get("adapter", MICA) == adapter]


def adapters(name: str, suite: str) -> list[str]:
    """Those that the run has in this suite, MiCA first."""
    return list(dict.fromkeys(one.axes.get("adapter", MICA) for one in result(name).select(suite=suite)))


def span(ratios: list[Ratio]) -> str:
    """From the lowest speedup to the highest."""
    return f"{1 / max(ratios).median:.2f}× to {1 / min(ratios).median:.2f}×"


def middle(ratios: list[Ratio]) -> str:
    """The median of speedups."""
    return f"{median(1 / one.median for one in ratios):.2f}×"


SPEED_HEADER = [
    "",
    "without adapter",
    "PEFT's default",
    "PEFT's best setting",
    "mica.fast",
    "against the default",
    "against the best",
]
MARK = "†"
FOOTNOTE = [f"{MARK} The interval contains 1: this run does not show that either is faster.", *[""] * 6]


def measured(run: str, *fresh: str) -> list[Row]:
    """``fresh``: a run of the suite of that name."""
    rows = [*_adapter_rows(run), *_block_rows(run), *_step_rows(run)]
    for one in fresh:
        rows += _step_rows(one)
    for adapter in adapters(run, "layer"):
        for dtype in SHORT:
            rows += [
                _layers_row(run, dtype, adapter),
                _layers_row(run, dtype, adapter, few=True),
                _dropout_row(run, dtype, adapter),
            ]
    return [SPEED_HEADER, *with_footnote([*rows, *_merge_rows(run)])]


def headline(counted: str, kept: str, one_core: str, two_cores: str, run: str, moe: str) -> list[Row]:
    """What a user chooses by.

    ``counted``: by `bench.fits`. ``kept``, ``one_core``, ``two_cores``: runs of the suites kept, step and
    fresh with plain LoRA. ``run``: has MiCA's creation. ``moe``: of the suite experts.
    """
    model = "Llama-3.1-8B"
    found = raw(counted)
    by_name = {row["name"]: row for row in found["models"][model] if not row["checkpointing"]}
    steps = [by_name[name] for name in (WITHOUT, *(f"LoRA, {how}" for how in FITS[:3]))]
    tokens = found["tokens"]
    of_kept, *_ = result(kept).select(suite="kept", adapter=PLAIN_LORA, dtype="bfloat16")
    clocks = [one for name in (one_core, two_cores) for one in _steps(name) if _is_plain(one)]
    created, loaded = (only(run, suite=suite) for suite in ("initialisation", "loading"))
    largest = max(result(moe).select(suite="experts"), key=lambda one: one.axes["out"])

    def in_ways(shown: Callable[[Group, str], str], *groups: Group) -> list[str]:
        """A cell for each way to train, with a part of each group."""
        ways = [(BARE, STOCK, best_stock(one.timings), FAST) for one in groups]
        return [" / ".join(map(shown, groups, of_way)) for of_way in zip(*ways, strict=True)]

    def megabytes(group: Group, name: str) -> str:
        return f"{group.timings[name].facts['saved_mb']:.0f} MB"

    def rate(group: Group, name: str) -> str:
        return number(group.axes["tokens"] / group.timings[name].median)

    def seconds(name: str, *groups: Group) -> str:
        return " / ".join(f"{number(one.timings[name].median)} s" for one in groups)

    return [
        ["", WITHOUT, *FITS[:3]],
        [
            f"{model}, LoRA, {tokens} tokens: kept for the backward (counted)",
            *(f"{step['kept_bytes'] / GIB:.1f} GiB" for step in steps),
        ],
        [
            "the same: tokens of a step that fit 80 GiB (counted)",
            *(f"{tokens_that_fit(step, tokens, 80):,}" for step in steps),
        ],
        ["SmolLM2-135M, LoRA, 512 tokens: kept for the backward", *in_ways(megabytes, of_kept)],
        ["the same: tokens a second, one core / two by the clock", *in_ways(rate, *clocks)],
        [
            "the same with MiCA: create / load the adapter",
            *("", seconds(STOCK, created, loaded), "", seconds(FAST, created, loaded)),
        ],
        [
            "a step with LoRA on 64 experts of 2048 × 1024",
            *(seconds(BARE, largest), seconds(LORA, largest), "", seconds(FAST_LORA, largest)),
        ],
    ]


def _is_plain(group: Group) -> bool:
    axes = group.axes
    return axes.get("adapter") == PLAIN_LORA and axes["dtype"] == "bfloat16" and "how" not in axes


def with_footnote(rows: list[Row]) -> list[Row]:
    """A last row says what the mark means, if a row has it."""
    if any(cell.endswith(MARK) for row in rows for cell in row):
        return [*rows, FOOTNOTE]
    return rows


def _speedup_cell(ratio: Ratio, digits: int = 2) -> str:
    """With a mark where the interval contains 1."""
    text = speedup(ratio, digits)
    return f"{text} {MARK}" if shows_no_difference(ratio) else text


def _adapter_rows(run: str) -> list[Row]:
    created = only(run, suite="initialisation")
    by_eigh = created.timings[EIGH].median
    loaded = only(run, suite="loading")
    against = f"the same against all eigenvectors of fp64 Gram matrices, Unsloth's way ({by_eigh:.1f} s)"
    ours = f"{number(created.timings[FAST].median)} s"
    return [
        _seconds_row("`get_peft_model`, SmolLM2-135M, fp32", created, digits=1),
        [against, "", "", "", ours, _speedup_cell(created.ratio(FAST, EIGH), digits=1), ""],
        _seconds_row("`PeftModel.from_pretrained`, fp32", loaded, digits=0),
    ]


def _throughput_row(label: str, group: Group, ours: str = FAST) -> Row:
    """In tokens/s; a speedup is the median of the rounds', not the quotient of these medians."""
    best = best_stock(group.timings)
    rates = []
    for name in (BARE, STOCK, best, ours):
        rates.append(f"{number(group.axes['tokens'] / group.timings[name].median)} tokens/s")
    return [label, *rates, *(_speedup_cell(group.ratio(ours, baseline)) for baseline in (STOCK, best))]


def _block_rows(run: str) -> list[Row]:
    rows = []
    for group in result(run).select(suite="block"):
        which = f"{group.axes['model']}, bf16, {group.axes['tokens']} tokens"
        label = f"the same of {which}" if rows else f"decoder block of {which}, forward + backward"
        rows.append(_throughput_row(label, group))
    return rows


def _steps(run: str) -> Iterator[Group]:
    """Also those in fresh processes."""
    for group in result(run).groups:
        if group.axes["suite"] in ("step", "fresh"):
            yield group


def _step_label(group: Group) -> str:
    axes = group.axes
    adapter = axes.get("adapter", MICA)
    words = [f"training step of {axes['model']}", adapter, SHORT[axes["dtype"]], f"{axes['tokens']} tokens"]
    if "how" in axes:
        words.append(f"{PAPER} (q and v only, dropout 0.05)" if axes["how"] == PAPER else axes["how"])
    if axes["suite"] == "fresh":
        words.append("fresh processes, by the clock")
    return ", ".join(words)


def _step_rows(run: str) -> list[Row]:
    rows = []
    for group in _steps(run):
        rows.append(_throughput_row(_step_label(group), group))
        if FAST_NORMS in group.timings:
            rows.append(_throughput_row('the same with `recompute="norms"`', group, FAST_NORMS))
    return rows


def _layers_row(run: str, dtype: str, adapter: str, few: bool = False) -> Row:
    """``few``: those with few tokens, also without a gradient."""
    passes = (BOTH, NO_GRADIENT) if few else (BOTH,)
    cells = layers(run, dtype, *passes, adapter=adapter)
    chosen = [one for one in cells if (one.axes["tokens"] < FEW) == few]
    return _span_row(f"linear layers, {adapter}", dtype, chosen)


def _dropout_row(run: str, dtype: str, adapter: str) -> Row:
    cells = layers(run, dtype, BOTH, dropout=DROPOUT, adapter=adapter)
    return _span_row(f"linear layers with dropout {DROPOUT}, {adapter}", dtype, cells)


def _span_row(what: str, dtype: str, cells: list[Group]) -> Row:
    """The span and the median of their speedups."""
    tokens = [one.axes["tokens"] for one in cells]
    spans = []
    for baseline in (lambda one: STOCK, lambda one: best_stock(one.timings)):
        ratios = [one.ratio(FAST, baseline(one)) for one in cells]
        spans.append(f"{span(ratios)}, median {middle(ratios)}")
    label = f"{len(cells)} {what}, {SHORT[dtype]}, {min(tokens)} to {max(tokens)} tokens"
    return [label, *[""] * 4, *spans]


def kept(*runs: str) -> list[Row]:
    """Megabytes, and what they are of the bare model's."""
    rows = [["", *SPEED_HEADER[1:5], '`recompute="norms"`']]
    for group in (one for run in runs for one in result(run).select(suite="kept")):
        bare = group.timings[BARE].facts["saved_mb"]
        cells = [f"{bare:.1f} MB"]
        for name in (STOCK, best_stock(group.timings), FAST, FAST_NORMS):
            ours = group.timings[name].facts["saved_mb"]
            cells.append(f"{ours:.1f} MB, {ours / bare:.3f}")
        words = [group.axes[axis] for axis in ("model", "adapter", "dtype", "how") if axis in group.axes]
        rows.append([", ".join(SHORT.get(word, word) for word in words), *cells])
    return rows


def peers(run: str) -> list[Row]:
    """Time ÷ that without adapter, and megabytes kept: a row an implementation, a column a cell."""
    groups = [*result(run).select(suite="peers")]
    header = [""]
    for group in groups:
        axes = group.axes
        header.append(f"{axes['model']}, {axes['in']} × {axes['out']}, {SHORT[axes['dtype']]}")
    rows = []
    for name in dict.fromkeys(name for group in groups for name in group.timings):
        row = [name]
        for group in groups:
            row.append("")
            if name in group.timings:
                row[-1] = (
                    f"{group.ratio(name, BARE).median:.2f}, {group.timings[name].facts['saved_mb']:.2f} MB"
                )
        rows.append(row)
    return [header, *rows]


def _merge_rows(run: str) -> list[Row]:
    rows = []
    for merge in result(run).select(suite="merge"):
        adapter = merge.axes.get("adapter", MICA)
        facts = [merge.timings[name].facts.get("weights_changed") for name in (STOCK, FAST)]
        if None in facts:
            rows.append(_seconds_row(f"`merge_and_unload`, {adapter}, bf16 (rounded once)", merge))
            continue
        changed = [f"{100 * share:.2f} %" for share in facts]
        rows.append(_seconds_row(f"merge + unmerge, {adapter}, bf16 (exact)", merge))
        rows.append(["weights that this changes", "", changed[0], "", changed[1], "", ""])
    return rows


def _seconds_row(label: str, group: Group, digits: int = 2) -> Row:
    stock, ours = (f"{number(group.timings[name].median)} s" for name in (STOCK, FAST))
    return [label, "", stock, "", ours, _speedup_cell(group.ratio(FAST, STOCK), digits), ""]


def host(run: str) -> list[Row]:
    """÷ stock PEFT in its best setting."""
    rows = [["fp32 / bf16 / bf16 under autocast", "mica.fast", "from Python", "kernels"]]
    for what in ("layer", "layer, without products", "block"):
        for adapter in adapters(run, f"host {what}"):
            for call in (NO_GRADIENT, BOTH):
                groups = of_adapter(run, adapter, suite=f"host {what}", call=call)
                rows.append([f"{what}, {adapter}, {call}", *_host_cells(groups)])
    return rows


def _host_cells(groups: list[Group]) -> Iterator[str]:
    for name in (FAST, names.PYTHON, names.KERNELS):
        timed = [group for group in groups if name in group.timings]
        ratios = [group.ratio(name, best_stock(group.timings)) for group in timed]
        yield " / ".join(f"{ratio.median:.2f}" for ratio in ratios)


def experts(run: str) -> list[Row]:
    rows = [["", "PEFT LoRA", "mica.fast", "ratio"]]
    for group in sorted(result(run).select(suite="experts"), key=lambda one: -one.axes["out"]):
        sizes = f"{group.axes['out']} and {group.axes['in']}"
        times = [f"{group.timings[name].median:.2f} s" for name in (LORA, FAST)]
        label = f"step, experts of {sizes} (bare: {group.timings[BARE].median:.2f} s)"
        rows.append([label, *times, shown(group.ratio(FAST, LORA))])
        for fact, label in (
            ("peak_mb", "memory it adds at its peak"),
            ("saved_mb", "saved for its backward pass"),
        ):
            theirs, ours = (group.timings[name].facts[fact] for name in (LORA, FAST))
            rows.append([f"{label}, {sizes}", f"{theirs:.0f} MB", f"{ours:.0f} MB", f"{ours / theirs:.2f}"])
    return rows


def subspaces(run: str) -> list[Row]:
    """A column a rank: the speedup over the SVD, and over all eigenvectors of the Gram matrix."""
    rows = [["out x in", *(f"r = {rank}" for rank in SOLVED_RANKS)]]
    for group in result(run).select(suite="subspace"):
        ours = [f"minor_subspace, auto, r = {rank}" for rank in SOLVED_RANKS]
        cells = []
        for name in ours:
            over_svd, over_eigh = (1 / group.ratio(name, other).median for other in (names.SVD, EIGH))
            cells.append(f"{over_svd:.1f}× / {over_eigh:.2f}×")
        rows.append(["{out} x {in}".format(**group.axes), *cells])
    return rows


def fits(run: str) -> list[Row]:
    """GiB of a step with MiCA, and the tokens that fit a device."""
    found = raw(run)
    names = [WITHOUT, *(f"MiCA, {how}" for how in FITS)]
    rows = [["", WITHOUT, *FITS]]
    for model, measured in found["models"].items():
        by_name = {row["name"]: row for row in measured if not row["checkpointing"]}
        steps = [by_name[name] for name in names]
        for which, label in (("kept", "kept for the backward"), ("total", "weights, step and Adam")):
            cells = [f"{step[f'{which}_bytes'] / GIB:.2f} GiB" for step in steps]
            rows.append([f"{model}: {label}", *cells])
        for memory in DEVICES:
            cells = [f"{tokens_that_fit(step, found['tokens'], memory):,}" for step in steps]
            rows.append([f"{model}: tokens that fit {memory} GiB", *cells])
    return rows


TABLES = {
    "measured": measured,
    "headline": headline,
    "kept": kept,
    "peers": peers,
    "host": host,
    "experts": experts,
    "subspaces": subspaces,
    "fits": fits,
}


def table(name: str, *files: str) -> str:
    header, *rows = TABLES[name](*files)
    return re.sub(r"\|  (?=\|)", "| ", markdown(header, rows)) + "\n"


def filled(page: str, root: Path | None = None) -> str:
    """The text of a page with the tables and texts that follow from the results.

    ``root``: of the checkout that has the page, and results on a GPU.
    """
    root = root or ROOT
    text = (root / page).read_text(encoding="utf-8")
    text = TABLE.sub(lambda found: found[1] + table(found[2], *found[3].split()), text)
    return TEXT.sub(lambda found: found[1] + on_a_gpu.text(found[2], root) + found[4], text)


def write(root: Path | None = None) -> None:
    """All pages."""
    root = root or ROOT
    for page in PAGES:
        (root / page).write_text(filled(page, root), encoding="utf-8")


if __name__ == "__main__":
    write()
