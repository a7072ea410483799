"""A pytest plugin for runs of the benchmarks: the operators of linear layers are slow or wrong there."""

import os
import time
from functools import partial

from mica.ops import linear
from mica.paths import reference_path


def slow(function, *args, **options):
    time.sleep(0.02)
    return function(*args, **options)


def wrong(function, formula, *args, **options):
    result = function(formula, *args, **options)
    if formula is not reference_path.linear:
        return result
    y, h = result
    return y * 1.1, h


os.environ["MICA_NATIVE"] = "0"  # what is broken here is Python
broken = {"slow": slow, "wrong": wrong}[os.environ["MICA_TEST_OPERATOR"]]
linear.run_formula = partial(broken, linear.run_formula)
