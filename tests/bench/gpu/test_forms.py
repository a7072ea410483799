"""What a run says of `mica.kernels.configs`: only what is certain replaces a default."""

import pytest

from bench.gpu.forms import host_bound, rows
from bench.results.names import BACKWARD, FORWARD, WALL
from mica.kernels.configs import Forms
from tests.support.gpu_results import SIZE, both_passes, of_forms, result


def forms(*groups):
    """(tokens, rank, form of the forward, of the backward), for each row: `Forms` without its source."""
    return [row[:4] for row in rows(result(*groups))]


def test_the_fastest_form_of_each_pass_and_size_the_most_tokens_first():
    groups = [
        of_forms(512, FORWARD, {"split": 3.0, "reference": 1.0}),
        of_forms(512, BACKWARD, {"split": 3.0, "mixed": 3.5}),
        *both_passes(8192, {"split": 3.0}, rank=4),
        *both_passes(8192, {"split": 3.0, "fused": 2.0, "mixed": 2.5}),
        of_forms(256, FORWARD, {"split": 3.0, "fused": 1.0}),  # and no backward: left out
        *both_passes(64, {"fused": 1.0}),  # no default to compare with: left out
        *both_passes(8192, {"split": 1.0, "reference": 0.5}, clock=WALL),  # device time decides
    ]
    assert forms(*groups) == [
        (8192, 4, "split", "split"),
        (8192, 16, "fused", "fused"),
        (512, 16, "reference", "split"),
    ]


FASTER = [2.9, 2.8, 2.9, 2.9, 2.8, 2.9, 2.9]
DRIFTING = [1.0, 2.0, 4.0, 6.0, 8.0, 9.0, 10.0]  # a machine that becomes ten times slower


@pytest.mark.parametrize(
    ("times", "form"),
    [
        ({"split": 3.0, "fused": FASTER}, "fused"),
        # The interval of 7 rounds is their range: one that is slower is enough
        ({"split": 3.0, "fused": [*FASTER[:-1], 3.1]}, "split"),
        ({"split": 3.0, "fused": [*[1.0] * 6, 9.0], "mixed": FASTER}, "mixed"),  # fused has the lower median
        ({"split": [3.0], "fused": [1.0]}, "split"),  # one round has no interval
        ({"split": DRIFTING, "fused": [0.9 * seconds for seconds in DRIFTING]}, "fused"),  # in every round
    ],
)
def test_a_form_must_be_faster_with_its_whole_interval(times, form):
    assert forms(*both_passes(8192, times)) == [(8192, 16, form, form)]


def test_all_layers_of_a_size_count_together():
    """In the first of two layers the fused form gains half a second."""
    first_layer = both_passes(8192, {"split": 1.0, "fused": 0.5})
    for times, form in (
        ({"split": 1.0, "fused": 1.1}, "fused"),  # in the second it loses less
        ({"split": 9.0, "fused": 9.6}, "split"),  # it loses more
        ({"split": 1.0}, "split"),  # it was not timed
    ):
        assert forms(*first_layer, *both_passes(8192, times, out=2 * SIZE)) == [(8192, 16, form, form)]


REFERENCE_WINS = {"split": 2.0, "reference": 1.0}
KERNELS_WIN = {"split": 1.0, "reference": 2.0}
UNCERTAIN = {"split": 1.0, "reference": [0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 1.1]}


def wall(tokens, times, **axes):
    return both_passes(tokens, times, clock=WALL, **axes)


@pytest.mark.parametrize(
    ("groups", "tokens"),
    [
        ([*wall(1, REFERENCE_WINS), *wall(128, REFERENCE_WINS), *wall(512, KERNELS_WIN)], 128),
        # the reference must certainly be faster
        ([*wall(1, REFERENCE_WINS), *wall(128, UNCERTAIN), *wall(512, KERNELS_WIN)], 1),
        # a larger size does not count where a smaller one has lost
        ([*wall(1, REFERENCE_WINS), *wall(128, KERNELS_WIN), *wall(512, REFERENCE_WINS)], 1),
        ([*wall(1, KERNELS_WIN), *wall(128, REFERENCE_WINS)], 0),
        (wall(8192, KERNELS_WIN), None),  # says nothing of smaller ones
        (wall(1, {"split": 1.0}), None),  # the reference was not timed
        # every layer of a size counts
        ([*wall(1, REFERENCE_WINS), *wall(128, REFERENCE_WINS), *wall(128, KERNELS_WIN, rank=64)], 1),
        # forward and backward together
        (
            [
                of_forms(1, FORWARD, REFERENCE_WINS, clock=WALL),
                of_forms(1, BACKWARD, {"split": 1.0, "reference": 3.0}, clock=WALL),
            ],
            0,
        ),
        (wall(1, REFERENCE_WINS)[:1], None),  # the backward was not timed
        (both_passes(1, REFERENCE_WINS), None),  # by device time, which decides nothing here
    ],
)
def test_the_host_bound_is_the_last_size_before_kernels_are_as_fast(groups, tokens):
    """In multiplications of a layer's base product. The order in which layers were timed does not count."""
    expected = tokens and tokens * SIZE**2
    assert host_bound(result(*groups), ()) == host_bound(result(*groups[::-1]), ()) == expected


def test_the_host_bound_compares_with_the_kernels_that_would_run():
    """Those of the row that fits; of split where none does, or where the row has the reference path."""
    found = result(*wall(1, {"split": 3.0, "fused": 1.0, "reference": 2.0}))
    assert host_bound(found, ()) == SIZE**2
    assert host_bound(found, (Forms(1, 16, "fused", "fused"),)) == 0
    assert host_bound(found, (Forms(1, 16, "reference", "reference"),)) == SIZE**2
    assert host_bound(found, (Forms(2, 16, "fused", "fused"),)) == SIZE**2  # another size's
