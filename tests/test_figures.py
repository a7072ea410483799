"""Figures in the README files follow from the committed results that the pages link to."""

import re
from statistics import median

import pytest

from bench import on_a_gpu, pages
from bench.report.words import shown
from bench.results import names
from bench.results.names import FAST, LORA, STOCK, best_stock

EPYC = "amd-epyc-avx512-bf16-2-threads"
TWO_THREADS = "intel-xeon-processor-amx-2-threads/2026-12-03-clock"


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables(page):
    """Where this fails, `python -m bench.pages` writes them again."""
    assert pages.filled(page) == (pages.ROOT / page).read_text(encoding="utf-8")


def test_every_table_and_text_is_shown_and_a_wrong_figure_is_seen(tmp_path, monkeypatch):
    texts = [(pages.ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES]
    assert {found[2] for text in texts for found in pages.TABLE.finditer(text)} == pages.TABLES.keys()
    assert {found[2] for text in texts for found in pages.TEXT.finditer(text)} == {*on_a_gpu.TEXTS}
    wrong = texts[0].replace("6,194", "6,195")
    assert wrong != texts[0]
    (tmp_path / "README.md").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.filled("README.md") == texts[0]


def speedup(ratio, digits):
    """How many times as fast, of a ratio of times."""
    middle, low, high = (f"{1 / value:.{digits}f}" for value in (ratio.median, ratio.high, ratio.low))
    return f"{middle}× ({low}–{high})"


def words():
    """Page, what its text says with figures, what these are."""
    main, bench, *_ = pages.PAGES
    (run,) = pages.sources("measured")
    assert run in pages.sources("headline")
    created = pages.only(run, suite="initialisation").ratio(FAST, STOCK)
    yield "mica/subspace/README.md", f"initialises {1 / created.median:.1f} times as fast as with stock PEFT"
    models = [one for suite in ("block", "step") for one in pages.result(run).select(suite=suite)]
    ratios = [one.ratio(FAST, best_stock(one.timings)) for one in models]
    faster = sum(ratio.high < 1 for ratio in ratios)
    yield bench, f"{faster} of the {len(models)} blocks and steps are faster than with PEFT's best setting"
    loading = pages.only(run, suite="loading").timings
    yield "mica/cli/USE.md", f"[{loading[STOCK].median:.1f} s instead of {loading[FAST].median:.2f} s]"
    created, loaded = (pages.only(TWO_THREADS, suite=suite) for suite in ("initialisation", "loading"))
    text = (
        "`get_peft_model` took {:.1f} s instead of {:.1f} s, {}, and loading {:.2f} s instead of {:.1f} s, {}"
    )
    figures = []
    for group, digits in ((created, 1), (loaded, 0)):
        times = [group.timings[name].median for name in (FAST, STOCK)]
        figures += [*times, speedup(group.ratio(FAST, STOCK), digits)]
    yield bench, text.format(*figures)
    cell = {"suite": "layer", "adapter": names.MICA, "pass": names.BOTH, "dtype": "bfloat16"}
    layers = pages.result(run).select(**cell, tokens=1024, out=2048, rank=16)
    (layer,) = (one for one in layers if "dropout" not in one.axes)
    ways = (names.COMPILED, names.COMPILED_FAST)
    text = "{} of the time with stock PEFT compiled, and {} with this operator"
    yield "mica/fast/README.md", text.format(*(shown(layer.ratio(way, STOCK)) for way in ways))
    rounds = pages.raw("2026-12-01-checkpointing/rounds")["seconds"]
    ratios = [one["mica.fast"] / one["PEFT, gradient checkpointing"] for one in rounds]
    figures = median(ratios), min(ratios), max(ratios)
    yield bench, "takes {:.2f} ({:.2f}–{:.2f}) of the CPU time of PEFT's step with it".format(*figures)
    yield main, f"[{figures[0]:.2f} of the time](bench/results/2026-12-01-checkpointing/README.md)"
    counted = pages.raw("fits")["models"]["Llama-3.1-8B"]
    checkpointed = [row for row in counted[pages.BF16] if row["checkpointing"]]
    (peak,) = {f"{row['peak_bytes'] / pages.GIB:.2f}" for row in checkpointed}
    prepared, in_bf16 = pages.raw("2026-12-01-kbit/kept")["kept_bytes"].values()
    yield "recipes/README.md", f"keeps [{prepared[FAST] / in_bf16[FAST]:.2f} times as much]"
    yield bench, f"peak of such a step, {peak} GiB of Llama-3.1-8B in bf16 for all"
    fixed = {row["name"]: row["total_bytes"] - row["peak_bytes"] for row in counted[pages.NF4]}
    less = (fixed["LoRA, here"] - fixed["LoRA, PEFT's best setting"]) / pages.GIB
    fewer = []
    for model, memory in (("Llama-3.1-8B", 24), ("Llama-3.1-70B", 80)):
        rows = pages.raw("fits")["models"][model][pages.NF4]
        by_name = {row["name"]: row for row in rows if row["checkpointing"]}
        best, ours = (by_name[f"LoRA, {way}"] for way in ("PEFT's best setting", "here"))
        share = pages.tokens_that_fit(ours, 4096, memory) / pages.tokens_that_fit(best, 4096, memory)
        fewer.append(f"{1 - share:.0%}".replace("%", " %"))
    yield bench, "{} of Llama-3.1-8B's in 24 GiB and {} of the 70B's in 80 GiB".format(*fewer)
    yield bench, f"are 16-bit, and take {less:.1f} GiB less of Llama-3.1-8B"
    ratio = pages.only(*pages.sources("experts"), suite="experts", out=1024).ratio(FAST, LORA).median
    yield main, f"[{ratio:.2f}× as long](bench/README.md#experts)"


def of_single_results():
    """Figures of suites that were measured once."""
    page = "bench/README.md"
    measured = pages.raw("2026-12-01-avx2/rounds")
    ranges = []
    for part in ("forward", "backward"):
        products = [one["seconds"] for one in measured["products"] if part in one["seconds"]["float32"]]
        ratios = [
            one[dtype][part] / one["float32"][part] for one in products for dtype in ("bfloat16", "float16")
        ]
        ranges.append(f"{min(ratios):.0f} to {max(ratios):.0f} times")
    forward, backward = ranges
    yield page, f"products take {forward} as long as fp32's in the forward, and {backward} in the backward"
    for dtype in ("bfloat16", "float16"):
        ratios = [
            median(one[dtype] / one["float32"] for one in layer["seconds"]) for layer in measured["layers"]
        ]
        yield page, f"{min(ratios):.2f} to {max(ratios):.2f} times as long in {dtype}"
    corpus, page = pages.raw(f"{EPYC}/2026-11-30-corpus"), "mica/cli/README.md"
    size = f"({corpus['documents']:,} documents, {corpus['tokens'] / 1e6:.0f} M tokens of SmolLM2)"
    yield page, f"read 500 MB of JSONL {size} in {corpus['cpu_seconds']:.0f} s of CPU time"
    yield page, f"at most {corpus['peak_resident_megabytes'] / 1e3:.2f} GB of resident memory"
    run, *others = (
        pages.raw(f"2026-11-30-requantised/{name}")
        for name in ("nf4", "merged", "merged-nf4", "merged-into-nf4")
    )
    before, after = run["perplexity_before"], run["perplexity_after"]
    said = f"held-out perplexity over nf4 from {before:.1f} to {after:.1f}; merged it was"
    merged, again, packed = (one["perplexity_before"] for one in others)
    said += f" {merged:.1f}, quantised again {again:.1f}, but {packed:.1f} with the adapter merged into"
    yield "mica/cli/USE.md", said


@pytest.mark.parametrize(("page", "said"), [*words(), *of_single_results()])
def test_words(page, said):
    assert re.sub(r"\s+", " ", said) in " ".join((pages.ROOT / page).read_text(encoding="utf-8").split())
