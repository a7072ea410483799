"""The two pictures of a run: what is in them, and that they repeat and read on both pages."""

from xml.etree import ElementTree

import matplotlib
import pytest

from bench.report import drawing, plots
from bench.results import names
from bench.results.names import ATEN, BACKWARD, BARE, BY_HAND, DEVICE_TIME, FAST, STOCK, WALL
from bench.results.schema import Ratio, Result
from tests.support.bench_results import a_group

PAGES = "#ffffff", "#0d1117"  # GitHub's light and dark
BASE = {"out": 2048, "in": 2048, "rank": 16, "dtype": "bfloat16"}
OVERHEADS = {STOCK: 1.3, names.STOCK_16: 0.6, names.LORA: 1.25, ATEN: 0.34, FAST: 0.22}
BY_TOKENS, AGAINST_STOCK = "cpu-overhead-by-tokens.svg", "cpu-against-stock.svg"


def layers(tokens, factor=1.0, **others):
    """Whose overheads are ``factor`` times `OVERHEADS`, less with more tokens."""
    groups = []
    for count in tokens:
        seconds = {
            BARE: 1.0,
            **{name: 1 + factor * (1 + 64 / count) * one for name, one in OVERHEADS.items()},
        }
        for part in (names.FORWARD, BACKWARD):
            axes = {"suite": "layer", "tokens": count, **BASE, "pass": part, **others}
            groups.append(a_group(f"layer, {count} tokens, {part}", axes, seconds))
    return groups


def others(**axes):
    small = {"model": "SmolLM2-135M", "rank": 16, "dtype": "float32", **axes}
    once = [
        a_group(suite, {"suite": suite, **small}, {STOCK: stock, FAST: fast})
        for suite, stock, fast in (("initialisation", 9, 1.1), ("loading", 60, 0.6), ("merge", 1, 2))
    ]
    block = {"suite": "block", "model": "Llama-3.2-1B", "tokens": 512, "rank": 16, **axes}
    return [*once, a_group("block", block, {BARE: 1.0, STOCK: 2.2, FAST: 1.1})]


def drawn(groups, folder):
    """file's name -> (path, caption)"""
    pictures = plots.draw(Result({}, groups), folder, "cpu")
    assert {path for path, _ in pictures} == {*folder.glob("*.svg")}
    return {path.name: (path, caption) for path, caption in pictures}


def gids(path, start):
    return [one for one in ElementTree.parse(path).iter() if one.get("id", "").startswith(start)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return drawn(layers([128, 512, 2048]) + others(), tmp_path_factory.mktemp("pictures"))


def test_what_is_drawn_and_how_much_is_in_it(pictures):
    counts = {
        name: [len(gids(path, start)) for start in ("series-", "interval-")]
        for name, (path, _) in pictures.items()
    }
    assert counts == {BY_TOKENS: [5, 5], AGAINST_STOCK: [4, 4]}
    for path, caption in pictures.values():
        assert path.stat().st_size < 100_000
        assert caption.endswith(".")
        assert "\n" not in caption


def test_the_caption_has_the_figures(pictures):
    _, caption = pictures[BY_TOKENS]
    assert "a frozen linear layer (2048 × 2048, rank 16, bfloat16), by tokens in the batch: " in caption
    assert ": mica.fast 33 % at 128 and 23 % at 2048 (bands: " in caption


def test_drawing_is_reproducible_whatever_the_users_settings(pictures, tmp_path):
    with matplotlib.rc_context({"font.size": 20, "text.color": "red", "svg.fonttype": "none"}):
        again = drawn(layers([128, 512, 2048]) + others(), tmp_path)
    for name, (path, _) in again.items():
        assert path.read_bytes() == pictures[name][0].read_bytes()


def test_what_the_run_does_not_have_is_not_drawn(tmp_path):
    assert drawn([], tmp_path) == {}
    assert drawn(layers([128, 512]), tmp_path) == {}  # no line of two points
    assert [*drawn(others(), tmp_path)] == [AGAINST_STOCK]


def test_an_implementation_without_a_number_leaves_the_others(tmp_path):
    groups = layers([128, 512, 2048]) + others()
    for group in groups:
        if group.axes["suite"] != "block":
            del group.timings[STOCK if group.axes["suite"] == "merge" else FAST]
    pictures = drawn(groups, tmp_path)
    assert len(gids(pictures[BY_TOKENS][0], "series-")) == 4
    assert FAST not in pictures[BY_TOKENS][1]
    assert len(gids(pictures[AGAINST_STOCK][0], "series-")) == 1  # the block


def test_the_longest_family_is_drawn_and_by_device_time_where_there_is_one(tmp_path):
    long, short = [1, 2, 4, 8], [1, 2, 4]
    groups = layers(short, 5.0, rank=8) + layers(long, 1.0) + layers(short, 9.0, rank=64)
    assert "(2048 × 2048, rank 16, bfloat16)" in drawn(groups, tmp_path)[BY_TOKENS][1]
    by_clock = {WALL: 3.0, DEVICE_TIME: 1.0, names.GRAPH: 2.0}
    groups = [
        one for clock, factor in by_clock.items() for one in layers([64, 128, 512], factor, clock=clock)
    ]
    pictures = drawn(groups + others(clock=WALL) + others(clock=DEVICE_TIME), tmp_path)
    assert f"rank 16, bfloat16, {DEVICE_TIME}), by tokens" in pictures[BY_TOKENS][1]
    assert ": mica.fast 44 % at 64 and 25 % at 512" in pictures[BY_TOKENS][1]
    assert len(gids(pictures[AGAINST_STOCK][0], "series-")) == 4  # by wall clock


def test_names_are_in_the_order_of_the_lines_ends():
    _, axes = drawing.blank(7, 3.5, "")
    ends = {"first": 3, "last": 1, "middle": 2}
    series = {name: {1: Ratio(1, 1, 1), 2: Ratio(end, -end, end)} for name, end in ends.items()}
    drawing.lines(axes, series, " %")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "middle", "last"]


def test_bars_begin_at_one_and_have_their_factor_written():
    _, axes = drawing.blank(7, 3.5, "")
    drawing.bars(axes, {"faster": Ratio(12.0, 11, 13), "slower": Ratio(0.5, 0.4, 0.6)})
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(1, 11.0), (1, -0.5)]
    assert [text.get_text() for text in axes.texts] == ["12×", "0.50×"]
    low, high = axes.get_xlim()
    assert low < 0.4
    assert high > 13


def contrast(one, other):
    """WCAG 2's ratio."""

    def luminance(colour):
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_reads_on_both_pages():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert BY_HAND not in drawing.STYLES  # drawn in the colour of text
    for colour in {drawing.INK, *(colour for colour, *_ in drawing.STYLES.values())}:
        assert min(contrast(colour, page) for page in PAGES) >= 3.5, colour


def test_pages_show_through_and_text_is_in_ink(pictures):
    for path, _ in pictures.values():
        styles = " ".join(one.get("style", "") for one in ElementTree.parse(path).iter()).lower()
        assert "#ffffff" not in styles
        assert "#000000" not in styles
        assert drawing.INK in styles
        assert "<text" not in path.read_text()  # a page's fonts are not known
