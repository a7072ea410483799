"""How often operators have run."""


def whatever_language(counts):
    """Counts of operators without those that say how many ran from C++, which depends on the machine."""
    return {name: count for name, count in counts.items() if not name.endswith("_native")}
