"""A pytest plugin for runs of the benchmarks: the layer's operator is slow or wrong there, as asked for."""

import os
import time

from mica import reference

_forward = reference.forward


def _slow(*args, **options):
    time.sleep(0.02)
    return _forward(*args, **options)


def _wrong(*args, **options):
    return _forward(*args, **options) * 1.1


reference.forward = {"slow": _slow, "wrong": _wrong}[os.environ["MICA_TEST_OPERATOR"]]
