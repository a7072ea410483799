"""What a run says of `mica.kernels.configs`: only what is certain replaces a default."""

import pytest

from bench.gpu.forms import host_bound, rows, summary
from bench.results.names import BACKWARD, DEVICE_TIME, FORWARD, WALL
from mica.kernels import configs
from mica.kernels.configs import HOST_BOUND, Forms
from tests.support.gpu_results import SIZE, both_passes, of_forms, result


def forms(*groups):
    return [row[:4] for row in rows(result(*groups))]


def test_the_fastest_form_of_each_pass_and_size_the_most_tokens_first():
    groups = [
        of_forms(512, FORWARD, {"split": 3.0, "reference": 1.0}),
        of_forms(512, BACKWARD, {"split": 3.0, "mixed": 3.5, "reference": 4.0}),
        of_forms(8192, FORWARD, {"split": 3.0, "fused": 2.0, "mixed": 2.5}),
        of_forms(8192, BACKWARD, {"split": 3.0, "fused": 2.0, "mixed": 1.0}),
        of_forms(8192, FORWARD, {"split": 3.0}, rank=4),
        of_forms(8192, BACKWARD, {"split": 3.0}, rank=4),
        of_forms(256, FORWARD, {"split": 3.0, "fused": 1.0}),  # and no backward: left out
        *both_passes(64, {"fused": 1.0}),  # no default to compare with: left out
    ]
    expected = [
        (8192, 4, "split", "split"),
        (8192, 16, "fused", "mixed"),
        (512, 16, "reference", "split"),
    ]
    assert forms(*groups) == expected
    by_wall = [of_forms(8192, part, {"split": 1.0, "fused": 0.5}, clock=WALL) for part in (FORWARD, BACKWARD)]
    assert forms(*by_wall) == []  # device time decides
    assert forms(*by_wall, *groups) == expected


def test_a_form_must_be_faster_with_its_whole_interval():
    faster = [2.9, 2.8, 2.9, 2.9, 2.8, 2.9, 2.9]
    once_slower = [*faster[:-1], 3.1]  # of 7 rounds the interval is the range
    assert forms(*both_passes(8192, {"split": 3.0, "fused": faster}))[0][2:] == ("fused", "fused")
    assert forms(*both_passes(8192, {"split": 3.0, "fused": once_slower}))[0][2:] == ("split", "split")
    # the fastest by its median is not certain, another is
    uncertain = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]
    times = {"split": 3.0, "fused": uncertain, "mixed": faster}
    assert forms(*both_passes(8192, times))[0][2:] == ("mixed", "mixed")
    # one round has no interval
    assert forms(*both_passes(8192, {"split": [3.0], "fused": [1.0]}))[0][2:] == ("split", "split")


def test_ratios_are_taken_within_rounds():
    """The machine becomes ten times slower; the form is faster in each round."""
    drifting = [1.0, 2.0, 4.0, 6.0, 8.0, 9.0, 10.0]
    times = {"split": drifting, "fused": [0.9 * seconds for seconds in drifting]}
    assert forms(*both_passes(8192, times))[0][2:] == ("fused", "fused")


def test_all_layers_of_a_size_count_together():
    """Faster for one of them, and slower for both together; or not timed in one."""
    one = both_passes(8192, {"split": 1.0, "fused": 0.5})
    other = both_passes(8192, {"split": 9.0, "fused": 9.6}, out=2 * SIZE)
    assert forms(*one)[0][2:] == ("fused", "fused")
    slower = both_passes(8192, {"split": 1.0, "fused": 1.1}, out=2 * SIZE)  # by less than is gained
    assert forms(*one, *slower)[0][2:] == ("fused", "fused")
    assert forms(*one, *other)[0][2:] == ("split", "split")
    assert forms(*one, *both_passes(8192, {"split": 1.0}, out=2 * SIZE))[0][2:] == ("split", "split")


REFERENCE_WINS = {"split": 2.0, "reference": 1.0}
KERNELS_WIN = {"split": 1.0, "reference": 2.0}
UNCERTAIN = {"split": 1.0, "reference": [0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 1.1]}


@pytest.mark.parametrize(
    ("by_tokens", "bound"),
    [
        ({}, None),
        ({1: REFERENCE_WINS, 128: REFERENCE_WINS, 512: KERNELS_WIN}, 128),
        ({1: REFERENCE_WINS, 128: UNCERTAIN, 512: KERNELS_WIN}, 1),
        ({1: REFERENCE_WINS, 128: KERNELS_WIN, 512: REFERENCE_WINS}, 1),  # not beyond the first that loses
        ({1: KERNELS_WIN, 128: REFERENCE_WINS}, 0),
        ({8192: KERNELS_WIN}, None),  # says nothing of smaller ones
        ({8192: REFERENCE_WINS}, 8192),
        ({1: {"split": 1.0}}, None),
    ],
)
def test_the_bound_of_the_host_is_the_last_size_before_kernels_are_as_fast(by_tokens, bound):
    groups = [one for tokens, times in by_tokens.items() for one in both_passes(tokens, times, clock=WALL)]
    expected = bound and bound * SIZE**2
    assert host_bound(result(*groups), ()) == expected
    assert host_bound(result(*groups[::-1]), ()) == expected


def test_the_bound_is_of_forward_and_backward_together_by_the_wall_clock():
    forward, backward = (of_forms(1, part, REFERENCE_WINS, clock=WALL) for part in (FORWARD, BACKWARD))
    slow = of_forms(1, BACKWARD, {"split": 1.0, "reference": 3.0}, clock=WALL)
    assert host_bound(result(forward, backward), ()) == SIZE**2
    assert host_bound(result(forward, slow), ()) == 0
    assert host_bound(result(forward), ()) is None
    assert host_bound(result(*both_passes(1, REFERENCE_WINS, clock=DEVICE_TIME)), ()) is None


def test_every_layer_of_a_size_counts_for_the_bound():
    groups = [
        *both_passes(1, REFERENCE_WINS, clock=WALL),
        *both_passes(128, REFERENCE_WINS, clock=WALL),
        *both_passes(128, KERNELS_WIN, clock=WALL, rank=64),
    ]
    assert host_bound(result(*groups), ()) == host_bound(result(*groups[::-1]), ()) == SIZE**2


def test_the_kernels_of_the_bound_are_those_that_would_run():
    times = {"split": 3.0, "fused": 1.0, "reference": 2.0}
    groups = both_passes(1, times, clock=WALL)
    assert host_bound(result(*groups), ()) == SIZE**2
    assert host_bound(result(*groups), (Forms(1, 16, "fused", "fused"),)) == 0
    assert host_bound(result(*groups), (Forms(1, 16, "reference", "reference"),)) == SIZE**2
    assert host_bound(result(*groups), (Forms(2, 16, "fused", "fused"),)) == SIZE**2  # another size's row


def test_the_summary_is_python_for_configs():
    groups = [
        *both_passes(8192, {"split": 3.0, "fused": 2.0}),
        *both_passes(1, REFERENCE_WINS, clock=WALL),
    ]
    names = {"Forms": Forms, "FORMS": {}, "HOST_BOUNDS": {}}
    exec(summary(result(*groups)), names)
    assert names["FORMS"] == {"a card": (Forms(8192, 16, "fused", "fused"),)}
    assert names["HOST_BOUNDS"] == {"a card": SIZE**2}
    assert summary(result()) == ""
    assert configs.host_bound_of("a card") == HOST_BOUND  # nothing is written
