"""Every table of figures in the README files follows from the committed results that the page links to."""

import json
import re
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from bench.quality.others import OTHERS
from bench.quality.recipes import OPTIONS, RECIPES
from bench.quality.report import page_table
from bench.results import names
from bench.results.names import BARE, BOTH, FAST, NO_GRADIENT, STOCK, STOCK_16
from bench.results.schema import Group, Ratio, Result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
XEON = "intel-xeon-processor-amx-2-threads/2026-11-25"
OLD = "intel-xeon-processor-2-threads/2026-11-25"
EPYC = "amd-epyc-avx512-bf16-2-threads/2026-11-26-host"
EXPERTS = "amd-epyc-avx512-bf16-2-threads/2026-11-26-experts"
UNGROUPED = f"{FAST}, ungrouped"  # mica.fast in blocks of results that also have groups of projections


@cache
def result(name: str) -> Result:
    return Result.load(RESULTS / f"{name}.json").with_both()


def only(name: str, **axes) -> Group:
    (group,) = result(name).select(**axes)
    return group


def text(page: str) -> str:
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


@cache
def tables(page: str) -> dict[str, list[str]]:
    """First cell of a row -> its other cells."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in rows}


def speedup(ratio: Ratio, digits: int = 2) -> str:
    low, middle, high = (f"{1 / value:.{digits}f}" for value in (ratio.high, ratio.median, ratio.low))
    return f"{middle}× ({low}–{high})"


def seconds(suite: str, decimals: tuple[int, int], digits: int) -> list[str]:
    group = only(XEON, suite=suite)
    shown = [f"{group.timings[name].median:.{n}f} s" for name, n in zip((STOCK, FAST), decimals, strict=True)]
    return [*shown, speedup(group.ratio(FAST, STOCK), digits)]


def block(model: str) -> list[str]:
    group = next(one for one in result(XEON).groups if one.name.startswith(f"block of {model},"))
    overheads = [f"{group.ratio(name, BARE).median:.2f}×" for name in (STOCK, UNGROUPED)]
    return [*overheads, speedup(group.ratio(UNGROUPED, STOCK))]


def layers(name: str, dtype: str) -> list[float]:
    """Speedups of the layers with at least 256 tokens."""
    groups = result(name).select(suite="layer", dtype=dtype, **{"pass": BOTH})
    return sorted(1 / one.ratio(FAST, STOCK).median for one in groups if one.axes["tokens"] >= 256)


def saved(dtype: str) -> list[float]:
    timings = only(XEON, suite="step", dtype=dtype).timings
    return [timings[name].facts["saved_mb"] for name in (BARE, STOCK, FAST)]


BLOCK = "decoder block of Llama-3.2-1B, bf16, 1024 tokens, relative to the bare frozen block"
INITIALISED, LOADED = "`get_peft_model`, SmolLM2-135M, fp32", "`PeftModel.from_pretrained`, fp32"
LAYERS = "22 linear layers, bf16, 256 to 8192 tokens"
SAVED = "saved for the backward pass of a step, SmolLM2-135M, bf16, 1024 tokens"


def measured() -> dict[str, list[str]]:
    """The table of `bench/README.md`'s first section."""
    wide, narrow, merge = layers(XEON, "bfloat16"), layers(XEON, "float32"), only(XEON, suite="merge")
    assert (len(wide), len(narrow)) == (22, 5)
    bare, stock, fast = saved("bfloat16")
    bare_32, stock_32, fast_32 = saved("float32")
    slower, changed = (
        merge.ratio(FAST, STOCK),
        [merge.timings[name].facts["weights_changed"] for name in (STOCK, FAST)],
    )
    less = [f"{stock:.0f} MB", f"{fast:.0f} MB", f"{stock - fast:.0f} MB less"]
    return {
        INITIALISED: seconds("initialisation", (1, 1), 1),
        LOADED: seconds("loading", (1, 2), 0),
        BLOCK: block("Llama-3.2-1B"),
        "the same of Llama-3.1-8B, 512 tokens": block("Llama-3.1-8B"),
        "the same of Qwen2.5-0.5B, 1024 tokens": block("Qwen2.5-0.5B"),
        "the same of GPT-2, 1024 tokens": block("GPT-2"),
        LAYERS: ["", "", f"{wide[0]:.2f}× to {wide[-1]:.2f}×, median {median(wide):.2f}×"],
        "5 linear layers, fp32, 256 to 4096 tokens": ["", "", f"{narrow[0]:.2f}× to {narrow[-1]:.2f}×"],
        f"{SAVED} (bare model: {bare:.0f} MB)": less,
        f"the same, fp32, 512 tokens (bare model: {bare_32:.0f} MB)": [
            f"{stock_32:.0f} MB",
            f"{fast_32:.0f} MB",
            "**none**: there is no copy to avoid",
        ],
        "merge + unmerge, bf16": [
            "",
            "",
            f"**{slower.median:.1f}× slower** ({slower.low:.1f}–{slower.high:.1f}): it is exact",
        ],
        "weights changed by merge + unmerge": [*(f"{100 * share:.2f} %" for share in changed), ""],
    }


@pytest.mark.parametrize("label", measured())
def test_measured_figures(label):
    assert tables("bench/README.md")[label] == measured()[label]


@pytest.mark.parametrize("label", [INITIALISED, LOADED, BLOCK, LAYERS, SAVED])
def test_headline_figures(label):
    """README's are those of the benchmarks' page."""
    (cells,) = (cells for name, cells in measured().items() if name.startswith(label))
    assert tables("README.md")[label] == cells


def test_every_headline_figure_is_checked():
    rows = [
        label for label, cells in tables("README.md").items() if re.search(r"\d+ MB|\d×", " ".join(cells))
    ]
    assert rows == [INITIALISED, LOADED, BLOCK, LAYERS, SAVED]


def test_where_readme_says_that_it_is_not_faster():
    page, narrow = text("README.md"), measured()["5 linear layers, fp32, 256 to 4096 tokens"][-1]
    assert f"fp32 layers gain {narrow} and save no memory" in page
    assert f"Merge + unmerge is {only(XEON, suite='merge').ratio(FAST, STOCK).median:.1f}× slower" in page
    blocks = [
        group.ratio(form, STOCK if group.axes["dtype"] == "float32" else STOCK_16).median
        for group in result(EPYC).select(suite="host block")
        for form in (f"{names.PYTORCH}, ungrouped", f"{names.KERNELS}, ungrouped")
    ]
    assert f"Blocks of tiny tensors are up to {max(blocks):.2f}× slower" in page


@pytest.mark.parametrize("name", [f"{XEON}-step", f"{XEON}-before", XEON])
def test_whole_steps(name):
    ratio = only(name, suite="step", dtype="bfloat16").ratio(FAST, STOCK)
    assert speedup(ratio) in text("bench/README.md")
    assert f"{1 / ratio.median:.2f}×" in text("README.md")


def test_where_it_is_not_faster():
    cells = {}
    for part in (BOTH, NO_GRADIENT):
        for group in result(EPYC).select(suite="layer", **{"pass": part}):
            cells[group.name] = group.axes, group.ratio(FAST, STOCK)
    slow = [(axes, ratio) for axes, ratio in cells.values() if ratio.median > 1.05]
    page = text("bench/README.md")
    assert f"[{len(cells)} cells]" in page
    assert "Three were more than 5 % slower" in page
    assert len(slow) == 3
    assert {(axes["dtype"], axes["out"], axes["in"]) for axes, _ in slow} == {("bfloat16", 576, 576)}
    shown = {(axes["tokens"], axes["rank"]): f"{ratio.median:.2f}" for axes, ratio in slow}
    assert shown == {(1, 64): "1.06", (1, 128): "1.08", (32, 128): "1.10"}
    assert "1 token at r = 64 and 128 (1.06 and 1.08 times its time), and 32 tokens at r = 128 (1.10," in page
    for dtype, shown in (("bfloat16", "bf16"), ("float32", "fp32")):
        few = [
            1 / ratio.median
            for axes, ratio in cells.values()
            if axes["dtype"] == dtype and axes["tokens"] >= 256
        ]
        assert f"{shown} {min(few):.2f}× to {max(few):.2f}×" in page
    sixteen = [
        group.ratio(FAST, STOCK_16).median
        for part in (BOTH, NO_GRADIENT)
        for group in result(EPYC).select(suite="layer", dtype="bfloat16", **{"pass": part})
    ]
    assert f"between {1 / min(sixteen):.2f}× faster and {max(sixteen):.2f}× slower" in page
    assert f"at the median {1 / median(sixteen):.2f}× faster" in page


def test_the_control_is_faster():
    slowest = [
        max(
            group.ratio(FAST, names.ATEN).median
            for part in (BOTH, NO_GRADIENT)
            for group in result(name).select(suite="layer", **{"pass": part})
            if names.ATEN in group.timings
        )
        for name in (EPYC, XEON)
    ]
    expected = "up to {:.2f}× faster there (8 tokens), and up to {:.2f}× on the Xeon".format(*slowest)
    assert expected in text("bench/README.md")


HOST = {
    "a layer, forward without gradient": ("host layer", NO_GRADIENT, "{}"),
    "a layer, forward + backward": ("host layer", BOTH, "{}"),
    "a Llama block (64 / 128), forward without gradient": ("host block", NO_GRADIENT, "{}, ungrouped"),
    "the same, forward + backward": ("host block", BOTH, "{}, ungrouped"),
}


@pytest.mark.parametrize("label", HOST)
def test_host_overhead(label):
    suite, call, form = HOST[label]
    expected = []
    for path in (names.PYTORCH, names.KERNELS):
        shown = []
        for dtype in ("float32", "bfloat16"):
            axes = {"layers": 1} if suite == "host block" else {}
            group = only(EPYC, suite=suite, call=call, dtype=dtype, **axes)
            suffix = ", adapters in the base dtype" if suite == "host layer" and dtype == "bfloat16" else ""
            stock = STOCK if dtype == "float32" else STOCK_16
            shown.append(f"{group.ratio(form.format(path) + suffix, stock).median:.2f}")
        expected.append(" / ".join(shown))
    assert [cell.strip("*") for cell in tables("bench/README.md")[label]] == expected


def test_generation():
    ratio = only(EPYC, suite="generation").ratio(FAST, STOCK)
    assert f"{ratio.median:.2f} times stock PEFT's time ({ratio.low:.2f}–{ratio.high:.2f})" in text(
        "bench/README.md"
    )


@pytest.mark.parametrize(
    "group", result("amd-epyc-as-avx2-2-threads/2026-11-26-dtype").groups, ids=lambda group: group.name
)
def test_processors_without_16_bit_instructions(group):
    label = " x ".join(str(group.axes[name]) for name in ("tokens", "out", "in"))
    ratios = [group.ratio(f"mica.fast, {dtype}", names.FLOAT32) for dtype in ("bfloat16", "float16")]
    expected = [f"{one.median:.2f} ({one.low:.2f}–{one.high:.2f})" for one in ratios]
    assert tables("bench/README.md")[label] == expected


@pytest.mark.parametrize("group", result(f"{OLD}-subspace").groups, ids=lambda group: group.name)
def test_initialisation(group):
    shape = group.name.removeprefix("minor subspace, ")
    old = next(
        one for one in result("amd-epyc-2-threads/2026-11-25-subspace").groups if one.name == group.name
    )
    ratios = [group.ratio(f"minor_subspace, r = {rank}", names.SVD) for rank in (16, 64, 128)]
    ratios.append(old.ratio("minor_subspace", names.SVD))
    label = f"{shape} (embedding)" if shape == "576 x 49152" else shape
    assert tables("mica/subspace/README.md")[label] == [f"{1 / one.median:.1f}×" for one in ratios]


@pytest.mark.parametrize("name", [OLD, "intel-xeon-processor-1-threads/2026-11-25-subspace"])
def test_initialisation_in_other_runs(name):
    groups = [one for one in result(name).groups if one.name.startswith("minor subspace")]
    speedups = [f"{1 / one.ratio('minor_subspace, r = 16', names.SVD).median:.1f}" for one in groups]
    page = text("mica/subspace/README.md")
    assert len(speedups) == 6
    assert ", ".join(speedups) in page or f"{', '.join(speedups[:-1])} and {speedups[-1]}" in page


def experts_rows() -> dict[str, list[str]]:
    def row(group, other, times="{:.2f} s", fast="{:.2f} s"):
        medians = [group.timings[name].median for name in (other, FAST)]
        ratio = group.ratio(FAST, other)
        shown = f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
        return [times.format(medians[0]), fast.format(medians[1]), shown]

    def memory(group, fact):
        values = [group.timings[name].facts[fact] for name in (names.LORA, FAST)]
        return [*(f"{value:.0f} MB" for value in values), f"{values[1] / values[0]:.2f}"]

    wide, narrow = (only(EXPERTS, suite="experts", out=out) for out in (2048, 1024))
    return {
        "step, experts of 2048 and 1024": row(wide, names.LORA),
        "memory it adds at its peak, 2048 and 1024": memory(wide, "peak_mb"),
        "saved for its backward pass, 2048 and 1024": memory(wide, "saved_mb"),
        "step, experts of 1024 and 512": row(narrow, names.LORA),
        "memory it adds at its peak, 1024 and 512": memory(narrow, "peak_mb"),
        "initialisation": row(only(EXPERTS, suite="experts init"), names.SVD, "{:.1f} s", "{:.1f} s"),
    }


@pytest.mark.parametrize("label", experts_rows())
def test_experts(label):
    assert tables("bench/README.md")[label] == experts_rows()[label]


def test_bare_experts():
    bare = [only(EXPERTS, suite="experts", out=out).timings[BARE].median for out in (2048, 1024)]
    assert f"take {bare[0]:.2f} and {bare[1]:.2f} s" in text("bench/README.md")
    ratio = only(EXPERTS, suite="experts", out=2048).ratio(FAST, names.LORA).median
    assert f"[{ratio:.2f} times the time](bench/README.md#experts)" in text("README.md")


def test_other_processors():
    page = text("bench/README.md")
    for name in (OLD, "amd-epyc-2-threads/2026-11-25"):
        (step,) = (one for one in result(name).groups if one.name == "training step, bfloat16")
        assert f"{1 / step.ratio(FAST, STOCK).median:.2f}×" in page.partition("## Other processors")[2]
    (step,) = (one for one in result(f"{OLD}-step").groups if one.name == "training step, bfloat16")
    assert f"and {1 / step.ratio(FAST, STOCK).median:.2f}× on" in page
    assert f"{step.ratio(STOCK, BARE).median:.2f} times the bare step" in page
    quantised = result(f"{OLD}-quantised").groups[0].overhead(FAST, names.LORA)
    assert f"{quantised.median:.2f} of plain PEFT LoRA's ({quantised.low:.2f}–{quantised.high:.2f})" in page
    (shared,) = (one for one in result(OLD).groups if "2 processes" in one.timings)
    assert f"{shared.ratio('2 processes', '1 process').median:.2f} times the time of one" in page


@pytest.mark.parametrize("shape", json.loads((RESULTS / "modelled/h100.json").read_text())["shapes"])
def test_modelled_figures(shape):
    label = " x ".join(str(shape[side]) for side in ("m", "n", "k"))
    forms = ("split", "fused", "stock PEFT, bf16 adapters", "stock PEFT, default (fp32 adapters)")
    percents = [shape["forms"][form]["percent"] for form in forms]
    expected = [f"{one['forward']:.0f} / {one['backward']:.0f} %" for one in percents]
    assert tables("kernels/README.md")[label] == expected


QUALITY = {
    "MiCA, mica.fast": "MiCA, mica.fast",
    "MiCA, stock PEFT, one seed": "MiCA, stock PEFT",
    "LoRA, same rank": "LoRA, same rank",
    "LoRA, same size (r = 8)": "LoRA, same size",
    "full fine-tuning": "full fine-tuning",
}


@pytest.mark.parametrize("label", QUALITY)
def test_model_quality(label):
    """The report's figures, which `bench.quality.report` makes of the JSON beside it."""
    report = (RESULTS / f"{XEON}-quality.md").read_text(encoding="utf-8")
    learned, forgotten, cost = (
        next(line for line in section.splitlines() if line.startswith(QUALITY[label])).split(" | ")
        for section in (report.partition(f"### {title}")[2] for title in ("Learned", "Forgotten", "Cost"))
    )
    trained, facts, prose, known, step = tables("bench/README.md")[label]
    assert trained == f"{int(cost[2].replace(',', '')) / 1e6:.1f} M"
    assert step == f"{cost[6]} s"
    assert (prose, known) == tuple(cell.replace(" to ", "–") for cell in (learned[4], forgotten[2]))
    rounded = re.sub(r"\d+\.\d", lambda number: f"{float(number[0]):.0f}", learned[2]).split(" ", 1)
    assert facts == " ".join([rounded[0], "%", *rounded[1:]]).replace(" to ", "–")


def test_half_a_gigabyte_of_text():
    path = RESULTS / "amd-epyc-avx512-bf16-2-threads/2026-11-26-corpus.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    page = tables("bench/README.md")
    for label, name in (
        ("tokenisation alone", "tokenise, first start"),
        ("the whole command, with one step, two perplexities and saving", "adapt, first start"),
        ("the whole command again: the tokens are cached", "adapt, second start"),
    ):
        run = result[name]
        assert run["status"] == 0
        peaks = [f"{run[key] / 2**30:.2f} GiB" for key in ("peak_bytes", "peak_bytes_of_children")]
        assert page[label] == [f"{run['seconds']:.0f} s", peaks[0], peaks[1] if peaks[1][0] != "0" else ""]
    assert f"({result['documents']:,} documents, 146 M tokens" in text("bench/README.md")
    assert "146,496,256 tokens" in result["adapt, first start"]["output"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*-quality-paper.json")), ids=lambda path: path.stem)
def test_model_quality_by_the_papers_recipe(path):
    """The table is `bench.quality.report`'s, and the page links to the report and the raw result."""
    page = (ROOT / "bench/README.md").read_text(encoding="utf-8")
    assert page_table(json.loads(path.read_text(encoding="utf-8"))) in page
    for file in (path, path.with_suffix(".md")):
        assert f"({file.relative_to(ROOT / 'bench')})" in page


def test_settings_of_model_quality():
    """What the page says of the run are the defaults of the command, and the recipes those of the code."""
    page = text("bench/README.md")
    epochs, tries = OPTIONS["epochs"][0], OPTIONS["tries"][0]
    assert (epochs, tries, OPTIONS["seeds"][0], OPTIONS["rank"][0]) == (8, 7, 3, 16)
    assert "Eight epochs of eight steps." in page
    assert "(at most seven), and three seeds there" in page
    for label, name in (("`paper` (arXiv 2604.01694)", "paper"), ("`all-linear`", "all-linear")):
        layers, _, alpha, schedule, *numbers = tables("bench/README.md")[label]
        recipe = RECIPES[name]
        targets = recipe.target_modules
        assert layers == ("all linear" if targets == "all-linear" else ", ".join(targets))
        assert alpha == {1: "r", 2: "2r"}[recipe.scaling]
        assert schedule == recipe.scheduler
        expected = (recipe.weight_decay, recipe.dropout, recipe.max_grad_norm)
        assert numbers == [f"{number:g}" for number in expected]


def test_what_others_measured():
    said = " ".join(" ".join(row) for row in OTHERS)
    for figure in ("5.9", "43.1", "47.8", "3.7"):
        assert figure in said
        assert figure in text("bench/README.md").partition("What others measured")[2]
