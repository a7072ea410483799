"""The thinning of cross products, on cases without tests behind them."""

import itertools
import random
from types import SimpleNamespace

from tests.support.thinning import left_out


class Item:
    def __init__(self, test, marks=(), tables=(), **params):
        case = "-".join(str(value) for value in params.values())
        self.test = test
        self.nodeid = f"tests/test_x.py::{test}[{case}]"
        self.callspec = SimpleNamespace(params=params)
        self.marks = marks
        self.tables = [SimpleNamespace(args=[names]) for names in tables]

    def iter_markers(self, name):
        return self.tables

    def get_closest_marker(self, name):
        return name if name in self.marks else None


def product(test, marks=(), **axes):
    cases = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [Item(test, marks, **case) for case in cases]


def left(items):
    """By test, the parameters of the cases that run."""
    dropped, cases = left_out(items), {}
    for item in items:
        if item not in dropped:
            cases.setdefault(item.nodeid.partition("[")[0].rpartition(":")[2], []).append(
                item.callspec.params
            )
    return cases


def test_every_value_is_left_once_and_some_tests_stay_whole():
    """Whatever the order of collection."""
    together = [
        Item("test_together", dtype=dtype, tolerance=dtype**2, shape=shape)
        for dtype, shape in itertools.product(range(4), range(4))
    ]
    whole = [
        *product("test_marked", ("whole",), dtype=range(4), shape=range(3)),
        *product("test_table", dtype=range(5)),
        *product("test_crossed_alone", shape=[[1], [2]], backend="xy"),
    ]
    tables = [  # of one row more than each value needs to occur
        Item(f"test_of_{first}", tables=[("n", first)], dtype=dtype, **{first: one, "n": other})
        for first, (one, other), dtype in itertools.product(("rows", "method"), ("a1", "a2", "b2"), range(2))
    ]
    items = [
        *product("test_free", dtype=range(5), shape=range(6), bias=range(2)),
        *product("test_crossed", path=("a", "b"), dtype=range(3), shape=range(3)),
        *together,
        *tables,
        *whole,
    ]
    cases = left(items)
    assert {test: len(of_test) for test, of_test in cases.items()} == {
        "test_free": 6,
        "test_crossed": 6,
        "test_together": 4,
        "test_of_rows": 3,
        "test_of_method": 4,
        "test_marked": 12,
        "test_table": 5,
        "test_crossed_alone": 4,
    }
    for name, values in (("dtype", range(5)), ("shape", range(6)), ("bias", range(2))):
        assert {case[name] for case in cases["test_free"]} == set(values)
    for path in ("a", "b"):
        assert {case["dtype"] for case in cases["test_crossed"] if case["path"] == path} == {0, 1, 2}
    assert left_out(random.Random(0).sample(items, len(items))) == left_out(items)
