"""A pytest plugin for runs of the benchmarks: the operators of linear layers are slow or wrong there."""

import os
import time

from mica.ops import linear
from mica.ops.operator import compute


def slow(*args):
    time.sleep(0.02)
    return compute(*args)


def wrong(name, *args):
    result = compute(name, *args)
    return result * 1.1 if name == "linear" else result


linear.compute = {"slow": slow, "wrong": wrong}[os.environ["MICA_TEST_OPERATOR"]]
