"""Groups of a benchmark's result, of times that are given: for tests of what is made of them."""

from bench.results.schema import Group, Rival


def a_group(name, axes, medians, facts=None):
    """Rivals with nine rounds within half a per cent of their medians, the same ones for all.

    ``facts``: rival -> what was counted of it.
    """
    rivals = {
        rival: Rival([seconds * (1 + i / 1000) for i in range(-4, 5)], dict((facts or {}).get(rival, {})))
        for rival, seconds in medians.items()
    }
    return Group(name, axes, rivals)
