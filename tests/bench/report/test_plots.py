"""The two pictures of a run: what is in them, and that they repeat and read on both pages."""

import copy
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from bench.report import drawing, plots
from bench.results import names
from bench.results.names import BARE, BOTH, BY_HAND, DEVICE_TIME, FAST, STOCK, WALL
from bench.results.schema import Group, Ratio, Result, Timing

PAGES = "#ffffff", "#0d1117"  # GitHub's light and dark
RUN = Result.load(Path(__file__).parents[1] / "golden" / "cpu.json")
BY_TOKENS, AGAINST_STOCK = "cpu-overhead-by-tokens.svg", "cpu-against-stock.svg"


def layers(tokens, factor, **others):
    """mica.fast adds less with more tokens."""
    shape = {"suite": "layer", "out": 2048, "in": 2048, "rank": 16, "dtype": "bfloat16", "pass": BOTH}
    return [
        Group("", shape | {"tokens": n} | others, {BARE: Timing([1.0]), FAST: Timing([1 + factor + 1 / n])})
        for n in tokens
    ]


def drawn(result, folder):
    """file's name -> (path, caption)"""
    pictures = plots.draw(result, folder, "cpu")
    assert {path for path, _ in pictures} == {*folder.glob("*.svg")}
    return {path.name: (path, caption) for path, caption in pictures}


def count(path, start):
    return sum(one.get("id", "").startswith(start) for one in ElementTree.parse(path).iter())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return drawn(RUN, tmp_path_factory.mktemp("pictures"))


def test_what_is_drawn_and_its_caption(pictures):
    """Where mica.fast was refused its line is shorter."""
    for name, expected in ((BY_TOKENS, 3), (AGAINST_STOCK, 5)):
        path, caption = pictures[name]
        assert [count(path, start) for start in ("series-", "interval-")] == [expected] * 2
        assert path.stat().st_size < 100_000
        assert caption.endswith(".")
        assert "\n" not in caption
    caption = pictures[BY_TOKENS][1]
    assert "a frozen linear layer (64 × 32, rank 8, bfloat16), by tokens in the batch: " in caption
    assert ": mica.fast 120 % at 128 and 60 % at 512 (bands: " in caption


def test_drawing_is_reproducible_whatever_the_users_settings(pictures, tmp_path):
    with matplotlib.rc_context({"font.size": 20, "text.color": "red", "svg.fonttype": "none"}):
        for name, (path, _) in drawn(RUN, tmp_path).items():
            assert path.read_bytes() == pictures[name][0].read_bytes()


def test_what_the_run_does_not_have_is_not_drawn(tmp_path):
    """An implementation that has a number in the training step alone leaves the others."""
    assert drawn(Result({}, layers([128, 512], 1.0)), tmp_path) == {}  # no line of two points
    for implementation, expected in ((FAST, {BY_TOKENS: 2, AGAINST_STOCK: 1}), (BARE, {AGAINST_STOCK: 5})):
        for group in (run := copy.deepcopy(RUN)).groups:
            if group.axes["suite"] != "step":
                group.timings.pop(implementation, None)
        pictures = drawn(run, tmp_path / implementation)
        assert {name: count(path, "series-") for name, (path, _) in pictures.items()} == expected
        assert not any(f": {FAST} " in caption for _, caption in pictures.values())


def test_the_longest_family_is_drawn_and_by_device_time_where_there_is_one(tmp_path):
    short, long = [1, 2, 4], [1, 2, 4, 8]
    groups = layers(short, 5.0, rank=8) + layers(long, 1.0) + layers(short, 9.0, rank=64)
    assert "(2048 × 2048, rank 16, bfloat16)" in drawn(Result({}, groups), tmp_path)[BY_TOKENS][1]
    groups = []
    for clock, factor in {WALL: 3.0, DEVICE_TIME: 0.25, names.GRAPH: 2.0}.items():
        step = Group("", {"suite": "step", "clock": clock}, {STOCK: Timing([2.0]), FAST: Timing([1.0])})
        groups += [*layers([10, 50, 100], factor, clock=clock), step]
    pictures = drawn(Result({}, groups), tmp_path)
    assert f"rank 16, bfloat16, {DEVICE_TIME}), by tokens" in pictures[BY_TOKENS][1]
    assert ": mica.fast 35 % at 10 and 26 % at 100" in pictures[BY_TOKENS][1]
    assert count(pictures[AGAINST_STOCK][0], "series-") == 1  # by wall clock


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


def test_every_colour_reads_on_both_pages(pictures):
    """The pages show through, and text is in ink and drawn as paths: a page's fonts are not known."""
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert BY_HAND not in drawing.STYLES  # drawn in the colour of text
    for colour in {drawing.INK, *(colour for colour, *_ in drawing.STYLES.values())}:
        assert min(contrast(colour, page) for page in PAGES) >= 3.5, colour
    for path, _ in pictures.values():
        styles = " ".join(one.get("style", "") for one in ElementTree.parse(path).iter()).lower()
        assert drawing.INK in styles
        assert not any(colour in styles for colour in ("#ffffff", "#000000"))
        assert "<text" not in path.read_text()
