"""The picture of a run: what is in it, and that it repeats."""

from math import inf
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from bench.report import plots
from bench.results.cell import Ratio
from bench.results.schema import Result

RUN = Result.load(Path(__file__).parents[1] / "golden" / "run.json")


def texts(artists):
    return [artist.get_text() for artist in artists]


def test_the_picture_of_factors_against_stock(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    plots.draw(RUN, tmp_path, "run")
    (figure,) = drawn
    once, each_step = figure.axes
    assert once.get_title("left") == "Paid once"
    assert each_step.get_title("left") == "Paid at each step"
    labels = [label.partition("\n")[0] for axes in figure.axes for label in texts(axes.get_yticklabels())]
    assert labels == [*plots.PANELS[plots.ONCE].values(), *["training step"] * 2]
    assert [once.get_xscale(), each_step.get_xscale()] == ["log", "linear"]
    assert texts(once.texts) == ["8.00×", "2.00×", "0.33×"]
    assert texts(each_step.texts) == ["1.33×", "1.36×"]


def test_drawing_is_reproducible_whatever_the_users_settings(tmp_path):
    first = plots.draw(RUN, tmp_path / "1", "run")
    with matplotlib.rc_context({"font.size": 20, "text.color": "red", "savefig.facecolor": "white"}):
        again = plots.draw(RUN, tmp_path / "2", "run")
    for (path, caption), (other, same) in zip(first, again, strict=True):
        assert (path.name, path.read_bytes(), caption) == (other.name, other.read_bytes(), same)
        assert matplotlib.image.imread(path)[0, 0, 3] == 0  # the page shows through


@pytest.mark.parametrize(
    ("ratio", "text", "is_hollow"),
    [
        (Ratio(12.0, 11, 13), "12×", False),
        (Ratio(0.7, 0.5, 0.99), "0.70×", False),
        (Ratio(1.3, 0.99, 1.6), "1.30×", True),
        (Ratio(3.0, 0.0, inf), "3.00×", True),  # one round has no interval, and proves nothing
    ],
)
def test_a_bar_begins_at_one_and_is_hollow_where_its_interval_contains_it(ratio, text, is_hollow):
    axes = Figure().add_subplot()
    plots.bars(axes, {"row": ratio}, is_log=True)
    (bar,) = axes.patches
    assert (bar.get_x(), bar.get_width()) == (1, pytest.approx(ratio.median - 1))
    assert (bar.get_facecolor()[3] == 0) == is_hollow
    assert texts(axes.texts) == [text]
