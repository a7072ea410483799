"""Groups of a benchmark's result with given times, for tests of what is made of them."""

from bench.results.schema import Group, Timing


def a_group(name, axes, medians, facts=None):
    """Implementations with nine rounds within half a per cent of their medians, the same spread for all.

    ``facts``: implementation -> what was counted for it.
    """
    spread = [1 + i / 1000 for i in range(-4, 5)]
    timings = {
        one: Timing([seconds * factor for factor in spread], dict((facts or {}).get(one, {})))
        for one, seconds in medians.items()
    }
    return Group(name, axes, timings)
