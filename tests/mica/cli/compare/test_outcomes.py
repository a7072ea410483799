"""Learned and forgotten, and how far they vary: by hand, on a few blocks."""

import math

import numpy as np
import pytest

from mica.cli.compare.outcomes import Found, Outcome, between_documents, find, outcome
from mica.cli.compare.schedule import BASE, RATES, SEEDS, TRIAL, Planned
from tests.mica.cli.compare.comparisons import World

BEFORE = World().result(Planned(TRIAL, BASE))


def run(rate, seed, learned):
    world = World(lambda *at: learned, between_seeds=0.0)
    return world.result(Planned(SEEDS if seed else RATES, "mica", rate, 60, seed))


def test_an_outcome_is_the_change_since_the_base():
    before = {"losses": {"validation": [3.0, 5.0], "test": [1.0, 2.0], "retained": [2.0, 4.0]}}
    after = {"losses": {"validation": [2.0, 5.5], "test": [0.5, 2.5], "retained": [2.1, 3.5]}}
    found = outcome(before, after)
    assert found.validation == 0.25
    assert found.changes["learned"].tolist() == [0.5, -0.5]
    assert found.changes["forgotten"] == pytest.approx([0.1, -0.5])
    assert found.means == pytest.approx([0.0, -0.2])


def test_the_first_seed_chooses_and_brings_its_others():
    """A later seed, which only the chosen rate has, may be better by chance."""
    runs = [run(1e-3, 2, 0.9), run(1e-3, 1, 0.1), run(1e-3, 0, 0.2), run(2e-3, 0, 0.3)]
    found = find(BEFORE, runs)
    assert (found.rate, [*found.curve], [*found.seeds]) == (2e-3, [1e-3, 2e-3], [0])
    found = find(BEFORE, runs[:3])
    assert [*found.seeds] == [0, 1, 2]
    assert found.each[:, 0] == pytest.approx([0.2, 0.1, 0.9])


def a_method(*seeds):
    return Found({}, 1e-3, {n: Outcome(0.0, {"learned": np.array(blocks)}) for n, blocks in enumerate(seeds)})


@pytest.mark.parametrize(
    ("methods", "documents", "error"),
    [
        # the differences 1, 2, 3, 4 of four documents: their standard deviation over the root of 4
        ([[[1.0, 2.0, 3.0, 4.0]], [[0.0] * 4]], [1, 2, 3, 4], np.std([1, 2, 3, 4], ddof=1) / 2),
        # blocks of one document are not independent: two documents of mean 1.5 and 3.5
        ([[[1.0, 2.0, 3.0, 4.0]], [[0.0] * 4]], [7, 7, 8, 8], np.std([1.5, 3.5], ddof=1) / math.sqrt(2)),
        # what all methods learn of a document makes none of the difference
        ([[[5.0, 1.0]], [[6.0, 2.0]]], [1, 2], 0.0),
        # the mean of seeds; the largest of all pairs
        ([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 0.0]], [[0.0, 4.0]]], [1, 2], 2.5),
        ([[[1.0, 2.0]], [[0.0, 0.0]]], [1, 1], math.nan),
        ([[[1.0, 2.0]]], [1, 2], math.nan),
    ],
)
def test_the_error_over_documents(methods, documents, error):
    found = between_documents([a_method(*seeds) for seeds in methods], "learned", documents)
    assert found == pytest.approx(error, nan_ok=True)
