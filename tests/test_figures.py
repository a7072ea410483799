"""Every figure in the README files follows from the committed results that the pages link to."""

import re

import pytest

from bench import on_a_gpu, pages
from bench.results import names
from bench.results.names import FAST, LORA, STOCK
from mica.kernels import measured

EPYC = "amd-epyc-avx512-bf16-2-threads"
TWO_THREADS = f"{EPYC}/2026-11-30-clock"


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables(page):
    """Where this fails, `python -m bench.pages` writes them again."""
    assert pages.filled(page) == (pages.ROOT / page).read_text(encoding="utf-8")


def test_every_table_and_text_is_shown_and_a_wrong_figure_is_seen(tmp_path, monkeypatch):
    texts = [(pages.ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES]
    assert {found[2] for text in texts for found in pages.TABLE.finditer(text)} == pages.TABLES.keys()
    assert {found[2] for text in texts for found in pages.TEXT.finditer(text)} == {*on_a_gpu.TEXTS}
    (tmp_path / "README.md").write_text(texts[0].replace("17.7 s", "17.8 s"), encoding="utf-8")
    (tmp_path / "kernels").mkdir()
    measured.write(measured.read(), tmp_path / "kernels" / "measured.json")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.filled("README.md") == texts[0]


def words():
    """Page, what its text says with figures, what these are."""
    main, bench, *_ = pages.PAGES
    (run,) = pages.sources("measured")
    assert pages.sources("headline") == [run, TWO_THREADS]
    created = pages.only(run, suite="initialisation").ratio(FAST, STOCK)
    yield "mica/subspace/README.md", f"initialises {1 / created.median:.1f} times as fast as with stock PEFT"
    loading = pages.only(run, suite="loading").timings
    yield "mica/cli/USE.md", f"[{loading[STOCK].median:.1f} s instead of {loading[FAST].median:.2f} s]"
    created, loaded = (pages.only(TWO_THREADS, suite=suite) for suite in ("initialisation", "loading"))
    text = (
        "`get_peft_model` took {:.1f} s instead of {:.1f} s, {}, and loading {:.2f} s instead of {:.1f} s, {}"
    )
    figures = []
    for group, digits in ((created, 1), (loaded, 0)):
        times = [group.timings[name].median for name in (FAST, STOCK)]
        figures += [*times, pages.speedup(group.ratio(FAST, STOCK), digits)]
    yield bench, text.format(*figures)
    shape = {"tokens": 1024, "out": 2048, "rank": 16}
    (layer,) = (one for one in pages.layers(run, "bfloat16", names.BOTH) if shape.items() <= one.axes.items())
    ways = (names.COMPILED, names.COMPILED_FAST, names.COMPILED_PLAIN)
    text = "{} of the time with stock PEFT compiled, {} with the operator and {} with the plain products"
    yield "mica/fast/README.md", text.format(*(pages.shown(layer.ratio(way, STOCK)) for way in ways))
    ratio = pages.only(*pages.sources("experts"), suite="experts", out=2048).ratio(FAST, LORA).median
    yield main, f"[{ratio:.2f}× as long](bench/README.md#experts)"


@pytest.mark.parametrize(("page", "said"), list(words()))
def test_words(page, said):
    assert re.sub(r"\s+", " ", said) in " ".join((pages.ROOT / page).read_text(encoding="utf-8").split())
