"""Groups of a benchmark's result, of times that are given: for tests of what is made of them."""

from bench.results.schema import Group, Timing


def a_group(name, axes, medians, facts=None):
    """Implementations with nine rounds within half a per cent of their medians, the same ones for all.

    ``facts``: implementation -> what was counted of it.
    """
    implementations = {
        implementation: Timing(
            [seconds * (1 + i / 1000) for i in range(-4, 5)], dict((facts or {}).get(implementation, {}))
        )
        for implementation, seconds in medians.items()
    }
    return Group(name, axes, implementations)
