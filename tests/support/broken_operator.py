"""A pytest plugin for runs of the benchmarks: the operators of linear layers are slow or wrong there."""

import os
import time

from mica.ops import linear
from mica.ops.operator import run_formula


def slow(*args):
    time.sleep(0.02)
    return run_formula(*args)


def wrong(name, *args):
    result = run_formula(name, *args)
    return result * 1.1 if name == "linear" else result


linear.run_formula = {"slow": slow, "wrong": wrong}[os.environ["MICA_TEST_OPERATOR"]]
