"""Every figure in the README files follows from the committed results that the pages link to."""

import re
from statistics import median

import pytest

from bench import pages
from bench.quality.recipes import OPTIONS, STOPS
from bench.report.compare import compare
from bench.results import names
from bench.results.names import FAST, LORA, STOCK
from bench.results.schema import Result


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables(page):
    """Where this fails, `python -m bench.pages` writes them again."""
    assert pages.filled(page) == (pages.ROOT / page).read_text(encoding="utf-8")


def test_every_table_is_shown_and_a_wrong_figure_is_seen(tmp_path, monkeypatch):
    texts = [(pages.ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES]
    assert {found[2] for text in texts for found in pages.TABLE.finditer(text)} == pages.TABLES.keys()
    (tmp_path / "README.md").write_text(texts[0].replace("22.6 s", "22.5 s"), encoding="utf-8")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.filled("README.md") == texts[0]


def words():
    """Page, what its text says with figures, what these are."""
    main, bench, *_ = pages.PAGES
    (narrow,) = (row for row in pages.measured() if "linear layers, fp32" in row[0])
    yield main, f"fp32 layers gain {narrow[-1]} and save no memory"
    times = 1 / pages.only(pages.XEON, suite="initialisation").ratio(FAST, STOCK).median
    yield main, f"initialise them {times:.0f} times as fast (SmolLM2-135M, two cores)"
    (step,) = (
        one for one in pages.result(f"{pages.LATEST}-autocast").select(suite="step") if "how" in one.axes
    )
    saved = [step.timings[name].facts["saved_mb"] for name in (FAST, STOCK, names.BARE)]
    text = "under it {:.0f} MB are saved for the backward, by stock PEFT {:.0f} (bare model: {:.0f})"
    yield bench, text.format(*saved)
    slower = pages.only(pages.XEON, suite="merge").ratio(FAST, STOCK).median
    for page in (main, bench):
        yield page, f"is {slower:.1f}× slower"
    steps = [1 / pages.step(name).ratio(FAST, STOCK).median for name in [*pages.STEPS][:3]]
    yield (
        main,
        "A whole bf16 step was {:.2f}× faster in one run, and {:.2f}× and {:.2f}× in two others".format(
            *steps
        ),
    )
    forms = [f"{name}, ungrouped" for name in (names.PYTORCH, names.KERNELS)]
    blocks = pages.result(f"{pages.EPYC}-host").select(suite="host block")
    most = max(pages.as_stock(one, form).median for one in blocks for form in forms)
    yield main, f"Blocks of tiny tensors are up to {most:.2f}× slower"
    told = [
        one.ratio(FAST, names.STOCK_16).median
        for one in pages.layers(f"{pages.EPYC}-host", "bfloat16", names.BOTH)
    ]
    assert 0.95 < median(told) < 1.05
    yield main, "told to keep its adapters in bf16 a layer is about even"
    ratio = pages.only(f"{pages.EPYC}-experts", suite="experts", out=2048).ratio(FAST, LORA).median
    yield main, f"[{ratio:.2f} times the time](bench/README.md#experts)"
    corpus = pages.raw(f"{pages.EPYC}-corpus")
    tokens = corpus["adapt, first start"]["output"].partition(" tokens")[0].replace(",", "")
    yield bench, f"({corpus['documents']:,} documents, {int(tokens) / 1e6:.0f} M tokens of SmolLM2)"
    before, after = (Result.load(pages.RESULTS / f"{pages.XEON}{end}.json") for end in ("-before", ""))
    found = compare(before, after, 0.05)
    yield "bench/METHOD.md", f"agree in {found.agreeing} of {found.ratios} ratios"
    # what the page says of a run of model quality are the defaults of the command
    assert OPTIONS["epochs"][0] == 8
    yield bench, "Eight epochs of eight steps, the same batches for all."
    assert len(STOPS) == 3
    yield bench, "measured at three stops of each training"
    energy = next(one for one in pages.energy() if one[:2] == ["full fine-tuning", "smallest"])[2:]
    assert all(0.9 < float(value) < 2.1 for value in energy)
    yield bench, "the updates of both methods are spread almost evenly over all directions"


@pytest.mark.parametrize(("page", "said"), [*words()])
def test_words(page, said):
    assert re.sub(r"\s+", " ", said) in " ".join((pages.ROOT / page).read_text(encoding="utf-8").split())
