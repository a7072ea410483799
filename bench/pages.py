"""``python -m bench.pages``: writes the tables, and what is said of GPUs, of the README files from results.

A table stands below a line ``<!-- table: NAME FILE ... -->``, up to the first line that is no row. `TABLES`
has its function, which is given those files of ``bench/results``, without their ending, and returns the
header and the rows. So a page says itself where its figures are from: after a new run its files are named
there. What is said of GPUs stands between ``<!-- text: NAME -->`` and ``<!-- end -->`` (`bench.on_a_gpu`).
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from statistics import median

from bench import on_a_gpu, study
from bench.report.words import Row, markdown, shown, shows_no_difference, speedup
from bench.results import names
from bench.results.cell import Group, Ratio
from bench.results.names import BARE, BOTH, EIGH, FAST, FAST_NORMS, LORA, NO_GRADIENT, STOCK, STOCK_16
from bench.results.schema import Result
from bench.results.throughput import number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "bench/README.md", "kernels/README.md", "mica/subspace/README.md")
TABLE = re.compile(r"(<!-- table: ([\w-]+)((?: [\w/-]+)*) -->\n)((?:\|.*\n)*)")
TEXT = re.compile(r"(<!-- text: ([\w-]+) -->)(.*?)(<!-- end -->)", re.DOTALL)
SHORT = {"bfloat16": "bf16", "float32": "fp32"}
FEW = 256  # tokens; where products of a layer begin to take most of its time
DROPOUT = 0.05
SOLVED_RANKS = (16, 64, 128)
STEPS_WITH_DROPOUT = {  # how -> in words
    "dropout 0.05": "with dropout 0.05",
    "paper's recipe": "in the paper's recipe (q and v only, dropout 0.05)",
}


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


def layers(name: str, dtype: str, *passes: str, dropout: float = 0.0) -> list[Group]:
    found = []
    for one in result(name).select(suite="layer", dtype=dtype):
        if one.axes["pass"] in passes and one.axes.get("dropout", 0.0) == dropout:
            found.append(one)
    return found


def bf16_steps(name: str) -> tuple[Group, Group]:
    """A training step of SmolLM2-135M, and the same under autocast."""
    steps = [*result(name).select(suite="step", dtype="bfloat16")]
    (plain,) = (one for one in steps if "how" not in one.axes)
    (autocast,) = (one for one in steps if one.axes.get("how") == "autocast")
    return plain, autocast


def as_stock(group: Group, name: str) -> Ratio:
    """To the stock whose adapters have the base's dtype; by default they are in float32."""
    return group.ratio(name, STOCK if group.axes["dtype"] == "float32" else STOCK_16)


def span(ratios: list[Ratio]) -> str:
    """From the lowest speedup to the highest."""
    return f"{1 / max(ratios).median:.2f}× to {1 / min(ratios).median:.2f}×"


def middle(ratios: list[Ratio]) -> str:
    """The median of speedups."""
    return f"{median(1 / one.median for one in ratios):.2f}×"


SPEED_HEADER = ["", "stock PEFT", "mica.fast", "speedup"]
MARK = "†"
FOOTNOTE = [f"{MARK} The interval contains 1: this run does not show that either is faster.", "", "", ""]


def measured(run: str) -> list[Row]:
    rows = [
        *_adapter_rows(run),
        *_block_rows(run),
        *_step_rows(run),
        _layers_row(run, "bfloat16"),
        _layers_row(run, "bfloat16", few=True),
        _layers_row(run, "bfloat16", STOCK_16),
        _layers_row(run, "bfloat16", STOCK_16, few=True),
        _layers_row(run, "float32"),
        _layers_row(run, "float32", few=True),
        _dropout_row(run, "bfloat16"),
        _dropout_row(run, "float32"),
        *_saved_rows(run),
        *_merge_rows(run),
    ]
    return [SPEED_HEADER, *with_footnote(rows)]


def headline(run: str, clock: str) -> list[Row]:
    """What a user chooses by: of each kind the first, and where nothing is gained.

    ``clock``: a run with two threads, by the wall clock.
    """
    created, _, loaded = _adapter_rows(run)
    on_two = _seconds_row("the same on two cores, by the clock", only(clock, suite="initialisation"), 1)
    step, autocast, _, _, paper = _step_rows(run)
    layers_16, layers_32 = (_layers_row(run, dtype) for dtype in ("bfloat16", "float32"))
    merge, *_ = _merge_rows(run)
    kept, *_ = _saved_rows(run)
    rows = [created, on_two, loaded, step, autocast, paper, layers_16, layers_32, merge, kept]
    return [SPEED_HEADER, *with_footnote(rows)]


def with_footnote(rows: list[Row]) -> list[Row]:
    """A last row says what the mark means, if a row has it."""
    if any(row[-1].endswith(MARK) for row in rows):
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
        [against, "", ours, _speedup_cell(created.ratio(FAST, EIGH), digits=1)],
        _seconds_row("`PeftModel.from_pretrained`, fp32", loaded, digits=0),
    ]


def _throughput_row(label: str, group: Group, ours: str = FAST) -> Row:
    """In tokens/s; the speedup is the median of the rounds', not the quotient of these medians."""
    bare, *rates = (
        f"{number(group.axes['tokens'] / group.timings[name].median)} tokens/s"
        for name in (BARE, STOCK, ours)
    )
    return [f"{label} (bare: {bare})", *rates, _speedup_cell(group.ratio(ours, STOCK))]


def _block_rows(run: str) -> list[Row]:
    rows = []
    for group in result(run).select(suite="block"):
        which = f"{group.axes['model']}, bf16, {group.axes['tokens']} tokens"
        label = f"the same of {which}" if rows else f"decoder block of {which}, forward + backward"
        rows.append(_throughput_row(label, group))
    return rows


def _step_rows(run: str) -> list[Row]:
    plain, autocast = bf16_steps(run)
    label = f"training step of SmolLM2-135M, bf16, {plain.axes['tokens']} tokens"
    rows = [_throughput_row(label, plain), _throughput_row("the same under autocast", autocast)]
    rows.append(_throughput_row('the same with `recompute="norms"`', plain, FAST_NORMS))
    for how, what in STEPS_WITH_DROPOUT.items():
        rows.append(_throughput_row(f"the same {what}", only(run, suite="step", how=how)))
    return rows


def _layers_row(run: str, dtype: str, baseline: str = STOCK, few: bool = False) -> Row:
    """``few``: those with few tokens, also without a gradient."""
    passes = (BOTH, NO_GRADIENT) if few else (BOTH,)
    cells = [one for one in layers(run, dtype, *passes) if (one.axes["tokens"] < FEW) == few]
    return _span_row("linear layers", dtype, cells, baseline)


def _dropout_row(run: str, dtype: str) -> Row:
    cells = layers(run, dtype, BOTH, dropout=DROPOUT)
    return _span_row(f"linear layers with dropout {DROPOUT}", dtype, cells)


def _span_row(what: str, dtype: str, cells: list[Group], baseline: str = STOCK) -> Row:
    """The span and the median of their speedups."""
    ratios = [one.ratio(FAST, baseline) for one in cells]
    tokens = [one.axes["tokens"] for one in cells]
    label = f"{len(ratios)} {what}, {SHORT[dtype]}, {min(tokens)} to {max(tokens)} tokens"
    if baseline == STOCK_16:
        label = f"{label}, against adapters in bf16"
    return [label, "", "", f"{span(ratios)}, median {middle(ratios)}"]


def _saved_rows(run: str) -> list[Row]:
    rows = []
    for group in result(run).select(suite="step"):
        bare, stock = (group.timings[name].facts["saved_mb"] for name in (BARE, STOCK))
        how = f", {group.axes['how']}" if "how" in group.axes else ""
        which = f"{SHORT[group.axes['dtype']]}{how}, {group.axes['tokens']} tokens"
        for name, option in ((FAST, ""), (FAST_NORMS, ', `recompute="norms"`')):
            if name not in group.timings:
                continue
            what = "the same" if rows else "kept for the backward pass of a step, SmolLM2-135M"
            kept = group.timings[name].facts["saved_mb"]
            label = f"{what}, {which}{option} (bare model: {bare:.0f} MB)"
            rows.append([label, f"{stock:.0f} MB", f"{kept:.0f} MB", f"{stock - kept:.0f} MB less"])
    return rows


def _merge_rows(run: str) -> list[Row]:
    merge = only(run, "merge + unmerge", suite="merge")
    unload = only(run, "merge_and_unload", suite="merge")
    changed = [f"{100 * merge.timings[name].facts['weights_changed']:.2f} %" for name in (STOCK, FAST)]
    return [
        _seconds_row("merge + unmerge, bf16 (exact)", merge),
        ["weights that this changes", *changed, ""],
        _seconds_row("`merge_and_unload`, bf16 (rounded once)", unload),
    ]


def _seconds_row(label: str, group: Group, digits: int = 2) -> Row:
    times = [f"{number(group.timings[name].median)} s" for name in (STOCK, FAST)]
    return [label, *times, _speedup_cell(group.ratio(FAST, STOCK), digits)]


def host(run: str) -> list[Row]:
    rows = [["fp32 / bf16 / bf16 under autocast", "mica.fast", "from Python", "kernels"]]
    for what in ("layer", "layer, without products", "block"):
        for call in (NO_GRADIENT, BOTH):
            groups = [*result(run).select(suite=f"host {what}", call=call)]
            cells = []
            for name in (FAST, names.PYTHON, names.KERNELS):
                cells.append(" / ".join(f"{as_stock(group, name).median:.2f}" for group in groups))
            rows.append([f"{what}, {call}", *cells])
    return rows


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


def quality(run: str) -> str:
    return study.table(raw(run))


TABLES = {
    "measured": measured,
    "headline": headline,
    "host": host,
    "experts": experts,
    "subspaces": subspaces,
    "quality": quality,
}


def table(name: str, *files: str) -> str:
    made = TABLES[name](*files)
    if not isinstance(made, str):
        header, *rows = made
        made = markdown(header, rows)
    return made.replace("|  |", "| |").replace("|  |", "| |") + "\n"


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


def main() -> None:
    (run,) = sources("quality")
    study.picture(raw(run), RESULTS / f"{run}.png")
    write()


if __name__ == "__main__":
    main()
