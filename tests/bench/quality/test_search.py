"""Which learning rate is tried next."""

import math

from bench.quality.search import best, is_enclosed, next_rate

RANGE = (1e-3, 2e-3)


def test_the_range_comes_first_then_what_is_beyond_the_best():
    tried = {}
    for rate, loss in ((1e-3, 3.0), (2e-3, 2.0), (4e-3, 1.5), (8e-3, 1.8)):
        assert next_rate(tried, RANGE, 9) == rate
        assert not is_enclosed(tried)
        tried[rate] = loss
    assert next_rate(tried, RANGE, 9) is None
    assert is_enclosed(tried)
    assert best(tried) == 4e-3


def test_downwards_until_the_limit():
    tried = {1e-3: 1.0, 2e-3: 2.0}
    assert next_rate(tried, RANGE, 3) == 5e-4
    tried[5e-4] = 0.9
    assert next_rate(tried, RANGE, 3) is None
    assert not is_enclosed(tried)
    assert next_rate({}, RANGE, 1) == 1e-3
    assert next_rate({1e-3: 1.0}, RANGE, 1) is None


def test_a_rate_that_diverged_is_worse():
    assert next_rate({1e-3: math.inf, 2e-3: math.inf}, RANGE, 9) == 5e-4
    assert next_rate({1e-3: 1.0, 2e-3: math.inf}, RANGE, 9) == 5e-4
    assert best({1.0: math.inf}) is None
    assert is_enclosed({5e-4: 2.0, 1e-3: 1.0, 2e-3: math.inf})
    assert not is_enclosed({1.0: math.inf})
