"""``python -m bench.pages``: writes the tables, and what is said of GPUs, of the README files from results.

A table stands below a line ``<!-- table: NAME FILE ... -->``, up to the first line that is no row. `TABLES`
has its function, which is given those files of ``bench/results``, without their ending, and returns the
header and the rows. So a page says itself where its figures are from: after a new run its files are named
there. What is said of GPUs stands between ``<!-- text: NAME -->`` and ``<!-- end -->`` (`bench.on_a_gpu`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

from bench import on_a_gpu
from bench.report.words import Row, in_short, markdown, shown, shows_no_difference, speedup, waited_for
from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.names import BARE, BOTH, EIGH, FAST, FAST_NORMS, LORA, MICA, STOCK, best_stock
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
SOLVED_RANKS = (16, 64, 128)
PAPER = "paper's recipe"
FITS = ("PEFT's default", "PEFT's best setting", "here", "here, with norms")
DEVICES = (24, 40, 80)  # GiB


@cache
def result(name: str) -> Result:
    """Runs before plain LoRA was timed do not name the adapter."""
    found = Result.load(RESULTS / f"{name}.json").with_both()
    for group in found.groups:
        group.axes.setdefault("adapter", MICA)
    return found


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


def only(name: str, **axes: str | int) -> Group:
    """The group with these axes."""
    (group,) = result(name).select(**axes)
    return group


def layers(name: str, **axes: str | int) -> list[Group]:
    """Those of MiCA in both passes, without dropout."""
    cells = result(name).select(suite="layer", adapter=MICA, **{"pass": BOTH}, **axes)
    return [one for one in cells if "dropout" not in one.axes]


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


def measured(run: str) -> list[Row]:
    return in_short(waited_for(result(run)))


def headline(run: str, clock: str, *fresh: str) -> list[Row]:
    """What a user chooses by: of each kind the first, and where nothing is gained.

    ``clock``: a run with two threads, by the wall clock; ``fresh``: a run of the suite of that name.
    """
    one_core = only(run, suite="initialisation")
    created = _seconds_row("`get_peft_model`, SmolLM2-135M, fp32", one_core, digits=1)
    loaded = _seconds_row("`PeftModel.from_pretrained`, fp32", only(run, suite="loading"), digits=0)
    on_two = _seconds_row("the same on two cores, by the clock", only(clock, suite="initialisation"), 1)
    steps = []
    for one in (run, *fresh):
        for group in _steps(one):
            if group.axes["dtype"] == "bfloat16" and group.axes.get("how") in (None, "autocast", PAPER):
                steps.append(_throughput_row(_step_label(group), group))
    wide = []
    for dtype, short in SHORT.items():
        cells = [one for one in layers(run, dtype=dtype) if one.axes["tokens"] >= FEW]
        what, *spans = _span_row(f"linear layers, {MICA}, {short}", cells)
        wide.append([what, *[""] * 4, *spans])
    merge = next(result(run).select(suite="merge", adapter=MICA))
    merged = _seconds_row(f"merge + unmerge, {MICA}, bf16 (exact)", merge)
    kept = _saved_row(next(_steps(run)))
    return [SPEED_HEADER, *with_footnote([created, on_two, loaded, *steps, *wide, merged, kept])]


def with_footnote(rows: list[Row]) -> list[Row]:
    """A last row says what the mark means, if a row has it."""
    if any(cell.endswith(MARK) for row in rows for cell in row):
        return [*rows, FOOTNOTE]
    return rows


def _speedup_cell(ratio: Ratio, digits: int = 2) -> str:
    """With a mark where the interval contains 1."""
    text = speedup(ratio, digits)
    return f"{text} {MARK}" if shows_no_difference(ratio) else text


def _throughput_row(label: str, group: Group) -> Row:
    """In tokens/s; a speedup is the median of the rounds', not the quotient of these medians."""
    best = best_stock(group.timings)
    rates = []
    for name in (BARE, STOCK, best, FAST):
        rates.append(f"{number(group.axes['tokens'] / group.timings[name].median)} tokens/s")
    return [label, *rates, *(_speedup_cell(group.ratio(FAST, baseline)) for baseline in (STOCK, best))]


def _steps(run: str) -> Iterator[Group]:
    """Also those in fresh processes."""
    for group in result(run).groups:
        if group.axes["suite"] in ("step", "fresh"):
            yield group


def _step_label(group: Group) -> str:
    axes = group.axes
    what = f"training step of {axes['model']}"
    words = [what, axes["adapter"], SHORT[axes["dtype"]], f"{axes['tokens']} tokens"]
    if "how" in axes:
        words.append(f"{PAPER} (q and v only, dropout 0.05)" if axes["how"] == PAPER else axes["how"])
    if axes["suite"] == "fresh":
        words.append("fresh processes, by the clock")
    return ", ".join(words)


def _span_row(what: str, cells: list[Group]) -> Row:
    """The span and the median of their speedups."""
    tokens = [one.axes["tokens"] for one in cells]
    spans = []
    for baseline in (lambda one: STOCK, lambda one: best_stock(one.timings)):
        faster = [1 / one.ratio(FAST, baseline(one)).median for one in cells]
        spans.append(f"{min(faster):.2f}× to {max(faster):.2f}×, median {median(faster):.2f}×")
    return [f"{len(cells)} {what}, {min(tokens)} to {max(tokens)} tokens", *spans]


def _saved_row(group: Group) -> Row:
    """What a step keeps for its backward."""
    ways = (BARE, STOCK, best_stock(group.timings), FAST)
    _, stock, best, ours = kept = [group.timings[name].facts["saved_mb"] for name in ways]
    label = f"kept for the backward pass: {_step_label(group)}"
    less = [f"{theirs - ours:.0f} MB less" for theirs in (stock, best)]
    return [label, *(f"{megabytes:.0f} MB" for megabytes in kept), *less]


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


def _seconds_row(label: str, group: Group, digits: int = 2) -> Row:
    stock, ours = (f"{number(group.timings[name].median)} s" for name in (STOCK, FAST))
    return [label, "", stock, "", ours, _speedup_cell(group.ratio(FAST, STOCK), digits), ""]


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
    names = ["without adapter", *(f"MiCA, {how}" for how in FITS)]
    rows = [["", "without adapter", *FITS]]
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
    "experts": experts,
    "subspaces": subspaces,
    "fits": fits,
}


def table(name: str, *files: str) -> str:
    rows = TABLES[name](*files)
    return re.sub(r"\|  (?=\|)", "| ", markdown(rows)) + "\n"


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
