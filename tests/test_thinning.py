"""The thinning of cross products, on cases without tests behind them."""

import itertools
import random
from types import SimpleNamespace

import pytest

from tests.support.thinning import left_out


class Item:
    def __init__(self, test, **params):
        case = "-".join(str(value) for value in params.values())
        self.nodeid = f"tests/test_x.py::{test}[{case}]"
        self.callspec = SimpleNamespace(params=params)
        self.marks = ()

    def get_closest_marker(self, name):
        return name if name in self.marks else None


def product(test="test_a", **axes):
    return [
        Item(test, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]


def left(items):
    dropped = left_out(items)
    return [item.callspec.params for item in items if item not in dropped]


@pytest.mark.parametrize(("dtypes", "shapes", "biases"), [(5, 6, 2), (5, 1, 2), (2, 3, 1), (4, 4, 4)])
def test_every_value_is_left_once(dtypes, shapes, biases):
    axes = {"dtype": range(dtypes), "shape": range(shapes), "bias": range(biases)}
    cases = left(product(**axes))
    assert len(cases) == max(dtypes, shapes, biases)
    for name, values in axes.items():
        assert {case[name] for case in cases} == set(values)


def test_crossed_names_stay_crossed():
    cases = left(product(path=("a", "b"), dtype=range(3), shape=range(3)))
    for path in ("a", "b"):
        assert sum(case["path"] == path for case in cases) == 3
        assert {case["dtype"] for case in cases if case["path"] == path} == {0, 1, 2}


def test_names_that_change_together_are_one_axis():
    table = [Item("test_a", dtype=number, tolerance=number**2, text=str(number)) for number in range(5)]
    assert not left_out(table)
    crossed = [
        Item("test_b", dtype=d, tolerance=d**2, shape=s) for d, s in itertools.product(range(4), range(4))
    ]
    assert len(left(crossed)) == 4


def test_tables_and_tests_of_their_own_are_whole():
    plain = SimpleNamespace(nodeid="tests/test_x.py::test_c")
    items = [*product("test_a", dtype=range(5)), *product("test_b", shape=[[1], [2]], backend="xy"), plain]
    assert not left_out(items)


def test_a_test_that_is_marked_stays_whole():
    items = product(dtype=range(4), shape=range(3))
    for item in items:
        item.marks = ("whole",)
    assert not left_out(items)


def test_the_choice_does_not_depend_on_the_order_of_collection():
    items = product(dtype=range(4), shape=range(3), bias=range(3))
    names = {item.nodeid for item in left_out(items)}
    shuffled = random.Random(0).sample(items, len(items))
    assert {item.nodeid for item in left_out(shuffled)} == names
    others = product("test_z", dtype=range(2), shape=range(2))
    assert names < {item.nodeid for item in left_out([*others, *items])}
