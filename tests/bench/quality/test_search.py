"""Which learning rate is tried next."""

import math

from bench.quality.search import best, is_enclosed, next_rate


def test_tries():
    tried = {}
    for rate, loss in ((1e-3, 3.0), (3e-3, 2.0), (9e-3, 2.5), (5.2e-3, 1.9), (3.9e-3, 2.1)):
        assert next_rate(tried, 1e-3) == rate
        tried[rate] = loss
    assert best(tried) == 5.2e-3
    assert is_enclosed(tried)
    assert next_rate({1.0: 1.0, 3.0: math.inf}, 1.0) == 0.33
    assert not is_enclosed({1.0: 1.0, 3.0: math.inf})
    assert next_rate({1.0: math.inf}, 1.0) == 0.33
    assert best({1.0: math.inf}) is None
