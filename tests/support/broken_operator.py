"""A pytest plugin for runs of the benchmarks: the operators of linear layers are wrong there."""

import os
from functools import partial

from mica.ops import linear, recompute
from mica.paths import reference_path


def wrong(function, formula, *args, **options):
    result = function(formula, *args, **options)
    if formula is not reference_path.linear:
        return result
    y, h = result
    return y * 1.1, h


os.environ["MICA_NATIVE"] = "0"  # what is broken here is Python
recompute.MIN_NUMBERS = 0  # without C++ a small x would be left to PEFT
linear.run_formula = partial(wrong, linear.run_formula)
