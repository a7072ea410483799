"""The two pictures of a run: what is in them, and that they repeat and read on both pages."""

import copy
from pathlib import Path

import matplotlib.image
import pytest

from bench.report import plots
from bench.results import names
from bench.results.cell import Group, Ratio, Timing
from bench.results.names import BARE, BOTH, DEVICE_TIME, FAST, STOCK, WALL
from bench.results.schema import Result

PAGES = "#ffffff", "#0d1117"  # GitHub's light and dark
RUN = Result.load(Path(__file__).parents[1] / "golden" / "cpu.json")
BY_TOKENS, AGAINST_STOCK = "overhead-by-tokens", "against-stock"


def layers(tokens, factor, **others):
    """mica.fast adds less with more tokens."""
    shape = {"suite": "layer", "out": 2048, "in": 2048, "rank": 16, "dtype": "bfloat16", "pass": BOTH}
    return [
        Group("", shape | {"tokens": n} | others, {BARE: Timing([1.0]), FAST: Timing([1 + factor + 1 / n])})
        for n in tokens
    ]


def drawn(result):
    """picture -> (number of lines with bands or of bars, caption)"""
    pictures = {}
    for name, figure, caption in plots.figures(result):
        (axes,) = figure.axes
        bands, bars = len(axes.collections), len(axes.patches)
        assert len(axes.lines) == bands + (bars + 1 if bars else 0)  # an interval a bar, and the line at 1
        assert caption.endswith(".")
        assert "\n" not in caption
        pictures[name] = bands or bars, caption
    return pictures


def test_what_is_drawn_and_its_caption():
    """Where mica.fast was refused its line is shorter."""
    pictures = drawn(RUN)
    assert {name: count for name, (count, _) in pictures.items()} == {BY_TOKENS: 3, AGAINST_STOCK: 5}
    caption = pictures[BY_TOKENS][1]
    assert "a frozen linear layer (64 × 32, rank 8, bfloat16), by tokens in the batch: " in caption
    assert ": mica.fast 120 % at 128 and 60 % at 512 (bands: " in caption


def test_drawing_is_reproducible_whatever_the_users_settings(tmp_path):
    first = plots.draw(RUN, tmp_path / "1", "cpu")
    with matplotlib.rc_context({"font.size": 20, "text.color": "red", "savefig.facecolor": "white"}):
        again = plots.draw(RUN, tmp_path / "2", "cpu")
    for (path, caption), (other, same) in zip(first, again, strict=True):
        assert (path.name, path.read_bytes(), caption) == (other.name, other.read_bytes(), same)
        assert path.stat().st_size < 100_000
        pixels = matplotlib.image.imread(path)
        assert pixels[0, 0, 3] == 0  # the page shows through


def test_what_the_run_does_not_have_is_not_drawn():
    """An implementation that has a number in the training step alone leaves the others."""
    assert drawn(Result({}, layers([128, 512], 1.0))) == {}  # no line of two points
    for implementation, expected in ((FAST, {BY_TOKENS: 2, AGAINST_STOCK: 1}), (BARE, {AGAINST_STOCK: 5})):
        for group in (run := copy.deepcopy(RUN)).groups:
            if group.axes["suite"] != "step":
                group.timings.pop(implementation, None)
        pictures = drawn(run)
        assert {name: count for name, (count, _) in pictures.items()} == expected
        assert not any(f": {FAST} " in caption for _, caption in pictures.values())


def test_the_longest_family_is_drawn_and_by_device_time_where_there_is_one():
    short, long = [1, 2, 4], [1, 2, 4, 8]
    groups = layers(short, 5.0, rank=8) + layers(long, 1.0) + layers(short, 9.0, rank=64)
    assert "(2048 × 2048, rank 16, bfloat16)" in drawn(Result({}, groups))[BY_TOKENS][1]
    groups = []
    for clock, factor in {WALL: 3.0, DEVICE_TIME: 0.25, names.GRAPH: 2.0}.items():
        step = Group("", {"suite": "step", "clock": clock}, {STOCK: Timing([2.0]), FAST: Timing([1.0])})
        groups += [*layers([10, 50, 100], factor, clock=clock), step]
    pictures = drawn(Result({}, groups))
    assert f"rank 16, bfloat16, {DEVICE_TIME}), by tokens" in pictures[BY_TOKENS][1]
    assert ": mica.fast 35 % at 10 and 26 % at 100" in pictures[BY_TOKENS][1]
    assert pictures[AGAINST_STOCK][0] == 1  # by wall clock


def test_lines_are_named_by_their_ends_and_bars_begin_at_one_with_their_factor_written():
    axes, bars = (matplotlib.figure.Figure().add_subplot() for _ in range(2))
    ends = {"first": 3, "last": 1, "middle": 2}
    plots.lines(axes, {name: {1: Ratio(1, 1, 1), 2: Ratio(end, -end, end)} for name, end in ends.items()}, "")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "middle", "last"]
    plots.bars(bars, {"faster": Ratio(12.0, 11, 13), "slower": Ratio(0.5, 0.4, 0.6)})
    assert [(bar.get_x(), bar.get_width()) for bar in bars.patches] == [(1, 11.0), (1, -0.5)]
    assert [text.get_text() for text in bars.texts] == ["12×", "0.50×"]
    low, high = bars.get_xlim()
    assert low < 0.4 < 13 < high


def luminance(colour):
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", sorted({plots.INK, *(style[0] for style in plots.STYLES.values())}))
def test_every_colour_reads_on_both_pages(colour):
    """WCAG 2's contrast."""
    for page in PAGES:
        low, high = sorted((luminance(colour), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 3.5
