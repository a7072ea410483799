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

from bench import on_a_gpu
from bench.report.words import Row, in_short, markdown, shown, waited_for
from bench.results import names
from bench.results.cell import Group
from bench.results.names import (
    BARE,
    DORA,
    EIGH,
    FAST,
    FAST_ACTIVATIONS,
    FAST_LORA,
    LORA,
    MICA,
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
SOLVED_RANKS = (16, 64, 128)
WITHOUT = "without adapter"
FITS = ("PEFT's default", "PEFT's best setting", "here", "here, norms saved")
DEVICES = (24, 48, 80)  # GiB
# How `bench.fits` counts a step
BF16, NF4, NF4_DROPOUT = "bf16", "nf4, chunked loss", "nf4, chunked loss, dropout 0.05"


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


def measured(run: str) -> list[Row]:
    return in_short(waited_for(result(run)))


def headline(counted: str, kept: str, one_core: str, two_cores: str, run: str, moe: str) -> list[Row]:
    """What a user chooses by.

    ``counted``: by `bench.fits`. ``kept``, ``one_core``, ``two_cores``: runs of the suites kept, step and
    fresh with plain LoRA. ``run``: has MiCA's creation. ``moe``: of the suite experts.
    """
    model = "Llama-3.1-8B"
    tokens = raw(counted)["tokens"]
    in_4_bits, in_bf16 = (_lora_steps(counted, model, how) for how in (NF4, BF16))
    smallest = DEVICES[0]
    of_kept, *_ = result(kept).select(suite="kept", adapter=PLAIN_LORA, dtype="bfloat16")
    clocks = [one for name in (one_core, two_cores) for one in _plain_steps(name)]
    created, loaded = (only(run, suite=suite) for suite in ("initialisation", "loading"))
    moe_step = only(moe, suite="experts", out=1024)  # of 2048 PEFT's time varies by a third within a run

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
            f"{model} in 4 bits, LoRA, {tokens} tokens in {smallest} GiB: layers to checkpoint (counted)",
            *(_fewest(step, smallest) for step in in_4_bits),
        ],
        [
            "the same: tokens of a step without checkpointing (counted)",
            *(f"{tokens_that_fit(step, tokens, smallest):,}" for step in in_4_bits),
        ],
        [
            f"{model} in bf16, LoRA, {tokens} tokens: kept for the backward (counted)",
            *(f"{step['kept_bytes'] / GIB:.1f} GiB" for step in in_bf16),
        ],
        ["SmolLM2-135M without its head, LoRA, 512 tokens: kept", *in_ways(megabytes, of_kept)],
        [
            "SmolLM2-135M, LoRA: tokens/s by CPU time of one core / by the clock on two",
            *in_ways(rate, *clocks),
        ],
        [
            "the same, with MiCA: create / load the adapter",
            *("", seconds(STOCK, created, loaded), "", seconds(FAST, created, loaded)),
        ],
        [
            "a step with LoRA on 64 experts of 1024 × 512",
            *(seconds(BARE, moe_step), seconds(LORA, moe_step), "", seconds(FAST_LORA, moe_step)),
        ],
    ]


def _plain_steps(run: str) -> Iterator[Group]:
    """With LoRA, in bf16, run in no special way; also in fresh processes."""
    for group in result(run).select(adapter=PLAIN_LORA, dtype="bfloat16"):
        if group.axes["suite"] in ("step", "fresh") and "how" not in group.axes:
            yield group


def kept(*runs: str) -> list[Row]:
    """Megabytes, and what they are of the bare model's."""
    rows = [["", WITHOUT, *FITS]]
    for group in (one for run in runs for one in result(run).select(suite="kept")):
        bare = group.timings[BARE].facts["saved_mb"]
        cells = [f"{bare:.1f} MB"]
        for name in (STOCK, best_stock(group.timings), FAST, FAST_ACTIVATIONS):
            ours = group.timings[name].facts["saved_mb"]
            cells.append(f"{ours:.1f} MB, {ours / bare:.3f}")
        words = [group.axes[axis] for axis in ("model", "adapter", "dtype", "how") if axis in group.axes]
        rows.append([", ".join(SHORT.get(word, word) for word in words), *cells])
    return rows


def kinds(run: str) -> list[Row]:
    """Counted by `bench.kinds`: what a forward keeps, of the model's without adapter."""
    rows = []
    for model, found in raw(run).items():
        bare = found[WITHOUT]
        ways = [way for way in found if way != WITHOUT and "MiCA, PEFT" not in way]
        ratios = {way: f"{found[way] / bare:.2f}" for way in ways}
        rows.append([model, f"{bare / 2**20:,.0f} MiB", *ratios.values()])
    return [["", WITHOUT, *ratios], *rows]


def peers(run: str) -> list[Row]:
    """Time ÷ that without adapter, and megabytes kept: a row an implementation, a column a cell."""
    groups = [*result(run).select(suite="peers")]
    header = [""]
    for group in groups:
        axes = group.axes
        adapter = "DoRA, " if axes["adapter"] == DORA else ""
        header.append(f"{adapter}{axes['model']}, {axes['in']} × {axes['out']}, {SHORT[axes['dtype']]}")
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


def experts(run: str) -> list[Row]:
    """Seconds, and what they are of PEFT's; megabytes."""
    ways = (LORA, FAST_LORA, FAST)
    rows = [["", "LoRA, PEFT", "LoRA, here", "MiCA, here"]]
    for group in sorted(result(run).select(suite="experts"), key=lambda one: -one.axes["out"]):
        sizes = f"{group.axes['out']} and {group.axes['in']}"
        theirs, *ours = (f"{group.timings[way].median:.2f} s" for way in ways)
        ratios = [shown(group.ratio(way, LORA)) for way in ways[1:]]
        times = [f"{time}, {ratio}" for time, ratio in zip(ours, ratios, strict=True)]
        label = f"step, experts of {sizes} (bare: {group.timings[BARE].median:.2f} s)"
        rows.append([label, theirs, *times])
        for fact, label in (
            ("peak_mb", "memory it adds at its peak"),
            ("saved_mb", "saved for its backward pass"),
        ):
            cells = [f"{group.timings[way].facts[fact]:.0f} MB" for way in ways]
            rows.append([f"{label}, {sizes}", *cells])
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


def _lora_steps(run: str, model: str, how: str, checkpointing: bool = False) -> list[dict]:
    """The rows without adapter, and with LoRA by PEFT's default, its best setting and here."""
    rows = raw(run)["models"][model][how]
    by_name = {row["name"]: row for row in rows if row["checkpointing"] == checkpointing}
    return [by_name[name] for name in (WITHOUT, *(f"LoRA, {way}" for way in FITS[:3]))]


def _fewest(step: dict, memory: int) -> str:
    fewest = step["fewest_checkpointed"][str(memory)]
    return "does not fit" if fewest is None else str(fewest)


def fits(run: str) -> list[Row]:
    """Of a step with LoRA on each device: the fewest checkpointed layers, and the tokens that fit."""
    tokens = raw(run)["tokens"]
    devices = " / ".join(map(str, DEVICES))
    rows = [[f"{devices} GiB", WITHOUT, *FITS[:3]]]

    def row(label: str, steps: list[dict], shown: Callable[[dict, int], str]) -> None:
        rows.append([label, *(" / ".join(shown(step, memory) for memory in DEVICES) for step in steps)])

    def fitting(step: dict, memory: int) -> str:
        return f"{tokens_that_fit(step, tokens, memory):,}"

    for model in raw(run)["models"]:
        steps = _lora_steps(run, model, NF4)
        row(f"{model}: layers to checkpoint for {tokens:,} tokens", steps, _fewest)
        row(f"{model}: tokens, none checkpointed", steps, fitting)
        row("the same, dropout 0.05", _lora_steps(run, model, NF4_DROPOUT), fitting)
        row(f"{model}: tokens, all checkpointed", _lora_steps(run, model, NF4, True), fitting)
    return rows


TABLES = {
    "measured": measured,
    "headline": headline,
    "kept": kept,
    "kinds": kinds,
    "peers": peers,
    "experts": experts,
    "subspaces": subspaces,
    "fits": fits,
}


def table(name: str, *files: str) -> str:
    return markdown(TABLES[name](*files)) + "\n"


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
