"""How often operators have run."""

PARTS = ("grad_b", "experts_grad_b")  # of a backward that is counted as a whole; C++ has no call for it


def whatever_language(counts):
    """Counts of operators without what depends on the machine: how many ran from C++, and parts of them."""
    return {
        name: count
        for name, count in counts.items()
        if not name.endswith("_native") and name.removesuffix("_kernels") not in PARTS
    }
