"""The tables of the pages: rows that show no difference are marked."""

import pytest

from bench import pages
from bench.results.cell import Group, Timing
from bench.results.names import BARE, FAST, STOCK


def step(*seconds):
    """A cell in which stock PEFT takes 1 s in every round."""
    stock = Timing([1.0] * len(seconds))
    return Group("", {"tokens": 8}, {BARE: stock, STOCK: stock, FAST: Timing([*seconds])})


@pytest.mark.parametrize(
    ("seconds", "is_marked"),
    [
        ([0.5, 0.51, 0.52], False),
        ([0.8, 1.0, 1.2], True),
        ([0.5], True),  # one round has no interval
    ],
)
def test_a_speedup_whose_interval_contains_one_is_marked_and_explained(seconds, is_marked):
    row = pages._throughput_row("step", step(*seconds))
    assert row[-1].endswith(f") {pages.MARK}") == is_marked
    assert pages.with_footnote([row]) == [row, pages.FOOTNOTE][: 1 + is_marked]
