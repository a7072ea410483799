"""The two pictures of a run: what is in them, and that they repeat and read on both pages."""

import copy
from math import inf
from pathlib import Path

import matplotlib.image
import pytest

from bench.report import plots
from bench.report.words import in_words
from bench.results import names
from bench.results.cell import Group, Ratio, Timing
from bench.results.names import BARE, BOTH, DEVICE_TIME, FAST, STOCK, WALL
from bench.results.schema import Result

PAGES = "#ffffff", "#0d1117"  # GitHub's light and dark
RUN = Result.load(Path(__file__).parents[1] / "golden" / "cpu.json")
THROUGHPUT, AGAINST_STOCK = "throughput", "against-stock"


def layers(tokens, factor, **others):
    """mica.fast adds less with more tokens."""
    shape = {"suite": "layer", "out": 2048, "in": 2048, "rank": 16, "dtype": "bfloat16", "pass": BOTH}
    return [
        Group("", shape | {"tokens": n} | others, {BARE: Timing([1.0]), FAST: Timing([1 + factor + 1 / n])})
        for n in tokens
    ]


def drawn(result):
    """picture -> (its title or titles, its lines of throughput or bars), caption"""
    pictures = {}
    for name, figure, caption in plots.figures(result):
        shown = [text.get_text() for axes in figure.axes for text in axes.get_yticklabels()]
        if name == THROUGHPUT:
            (axes,) = figure.axes
            shown = [text.get_text() for text in axes.get_legend().get_texts()]
        assert caption.endswith(".")
        assert "\n" not in caption
        pictures[name] = [axes.get_title() for axes in figure.axes], shown, caption
    return pictures


def test_what_is_drawn_and_its_caption():
    pictures = drawn(RUN)
    (title,), lines, caption = pictures[THROUGHPUT]
    assert title.splitlines()[1] == "64 × 32, r = 8, bfloat16"
    assert lines == [BARE, STOCK, FAST]
    assert "(64 × 32, r = 8, bfloat16), forward + backward, by tokens in the batch: bare, " in caption
    titles, bars, _ = pictures[AGAINST_STOCK]
    assert [title.partition(":")[0] for title in titles] == ["Paid once", "Paid at each step"]
    suites = [bar.partition("\n")[0] for bar in bars]
    assert suites == [
        name for panel in plots.PANELS.values() for name in panel.values() if "block" not in name
    ]


def test_what_is_paid_once_is_logarithmic_and_what_is_paid_at_each_step_is_linear():
    (figure,) = (figure for name, figure, _ in plots.figures(RUN) if name == AGAINST_STOCK)
    once, each_step = figure.axes
    assert [axes.get_xscale() for axes in (once, each_step)] == ["log", "linear"]
    assert [text.get_text() for text in once.texts] == ["8.00×", "100×", "0.33×"]
    assert [text.get_text() for text in each_step.texts] == ["1.36×"]


def test_the_lines_are_tokens_per_second_at_the_median_round():
    layer = Group("", {"tokens": 100}, {BARE: Timing([1.0, 4.0, 2.0]), FAST: Timing([5.0, 4.0, 8.0])})
    axes = matplotlib.figure.Figure().add_subplot()
    plots.lines(axes, [layer])
    bare, fast = (line.get_ydata() for line in axes.lines[:2])
    assert [*bare, *fast] == [50.0, 20.0]
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_axes_are_in_words():
    axes = {"suite": "step", "model": "M", "tokens": 512, "rank": 16, "dtype": "bfloat16", "sequence": 512}
    assert in_words(axes | {"how": "autocast"}) == "M, 512 tokens, r = 16, bfloat16, autocast"
    axes["sequence"] = 256
    assert in_words(axes) == "M, 512 tokens, r = 16, bfloat16, 256 tokens a sequence"


def test_drawing_is_reproducible_whatever_the_users_settings(tmp_path):
    first = plots.draw(RUN, tmp_path / "1", "cpu")
    with matplotlib.rc_context({"font.size": 20, "text.color": "red", "savefig.facecolor": "white"}):
        again = plots.draw(RUN, tmp_path / "2", "cpu")
    for (path, caption), (other, same) in zip(first, again, strict=True):
        assert (path.name, path.read_bytes(), caption) == (other.name, other.read_bytes(), same)
        assert path.stat().st_size < 150_000
        pixels = matplotlib.image.imread(path)
        assert pixels[0, 0, 3] == 0  # the page shows through


def test_what_the_run_does_not_have_is_not_drawn():
    """An implementation that has a number in the training step alone leaves the others."""
    assert drawn(Result({}, layers([128, 512], 1.0))) == {}  # no line of two points
    for implementation, lines, panels in ((FAST, [BARE, STOCK], 1), (BARE, None, 2)):
        for group in (run := copy.deepcopy(RUN)).groups:
            if group.axes["suite"] != "step":
                group.timings.pop(implementation, None)
        pictures = drawn(run)
        assert len(pictures[AGAINST_STOCK][0]) == panels
        assert (pictures[THROUGHPUT][1] if THROUGHPUT in pictures else None) == lines


def test_the_longest_family_is_drawn_and_by_device_time_where_there_is_one():
    short, long = [1, 2, 4], [1, 2, 4, 8]
    groups = layers(short, 5.0, rank=8) + layers(long, 1.0) + layers(short, 9.0, rank=64)
    assert "(2048 × 2048, r = 16, bfloat16)" in drawn(Result({}, groups))[THROUGHPUT][2]
    groups = []
    for clock, factor in {WALL: 3.0, DEVICE_TIME: 0.25, names.GRAPH: 2.0}.items():
        step = Group("", {"suite": "step", "clock": clock}, {STOCK: Timing([2.0]), FAST: Timing([1.0])})
        groups += [*layers([10, 50, 100], factor, clock=clock), step]
    pictures = drawn(Result({}, groups))
    assert f"r = 16, bfloat16, {DEVICE_TIME}), forward" in pictures[THROUGHPUT][2]
    assert len(pictures[AGAINST_STOCK][1]) == 1  # by wall clock


def bars(factors, is_log=False):
    axes = matplotlib.figure.Figure().add_subplot()
    plots.bars(axes, factors, is_log)
    return axes


@pytest.mark.parametrize("is_log", [True, False])
def test_bars_begin_at_one_with_their_factor_written(is_log):
    axes = bars({"faster": Ratio(12.0, 11, 13), "slower": Ratio(0.5, 0.4, 0.6)}, is_log)
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(1, 11.0), (1, -0.5)]
    assert [text.get_text() for text in axes.texts] == ["12×", "0.50×"]
    assert axes.get_xscale() == ("log" if is_log else "linear")
    low, high = axes.get_xlim()
    assert low < 0.4 < 13 < high


def test_factors_stand_in_a_column_beside_the_axes():
    axes = bars({"faster": Ratio(3.0, 2, 5), "about as fast": Ratio(1.1, 1.05, 1.2)})
    axes.figure.draw_without_rendering()
    edges = [text.get_window_extent() for text in axes.texts]
    assert edges[0].x1 == pytest.approx(edges[1].x1, abs=1)
    assert min(edge.x0 for edge in edges) > axes.bbox.x1


@pytest.mark.parametrize(
    ("ratio", "is_hollow"),
    [
        (Ratio(1.3, 1.01, 1.6), False),
        (Ratio(0.7, 0.5, 0.99), False),
        (Ratio(1.3, 0.99, 1.6), True),
        (Ratio(0.7, 0.5, 1.01), True),
        (Ratio(3.0, 0.0, inf), True),  # one round has no interval, and proves nothing
    ],
)
def test_a_bar_whose_interval_contains_one_is_hollow(ratio, is_hollow):
    axes = bars({"row": ratio})
    (bar,) = axes.patches
    (factor,) = axes.texts
    assert (bar.get_facecolor()[3] == 0) == is_hollow
    assert factor.get_color() == (plots.INK if is_hollow else plots.OURS)


@pytest.mark.parametrize(("seconds", "words"), [([1.0, 1.1], "it contains 1"), ([1.0], "one round only")])
def test_the_legend_says_why_a_bar_is_hollow(seconds, words):
    timings = {STOCK: Timing([1.0] * len(seconds)), FAST: Timing(seconds)}
    ((_, figure, _),) = plots.figures(Result({}, [Group("", {"suite": "step", "model": "M"}, timings)]))
    (legend,) = figure.legends
    assert legend.get_texts()[-1].get_text().endswith(f"{words}: no difference shown")


def test_what_all_cells_of_a_panel_have_in_common_is_in_its_title_only():
    timings = {STOCK: Timing([2.0]), FAST: Timing([1.0])}
    step = {"suite": "step", "model": "M", "rank": 16}
    cells = [Group("", {**step, "dtype": dtype}, timings) for dtype in ("bfloat16", "float32")]
    titles, labels, _ = drawn(Result({}, cells))[AGAINST_STOCK]
    assert titles == ["Paid at each step: M, r = 16"]
    assert labels == ["training step\nbfloat16", "training step\nfloat32"]
    titles, labels, _ = drawn(Result({}, cells[:1]))[AGAINST_STOCK]
    assert titles == ["Paid at each step"]
    assert labels == ["training step\nM, r = 16, bfloat16"]


def test_a_bar_of_a_fifth_can_be_seen_where_one_is_paid_at_each_step():
    axes = bars({"step": Ratio(1.2, 1.1, 1.3)})
    low, high = axes.get_xlim()
    assert (1.2 - 1) / (high - low) > 0.2


def luminance(colour):
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", sorted(plots.PALETTE.values()))
def test_every_colour_reads_on_both_pages(colour):
    """WCAG 2's contrast."""
    for page in PAGES:
        low, high = sorted((luminance(colour), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 3.5
