import itertools
from types import SimpleNamespace

import pytest

from tests.support.thinning import off_the_diagonal


class Item:
    def __init__(self, name, **params):
        self.nodeid, self.params = f"test_x.py::{name}[{len(params)}]", params
        if params:
            self.callspec = SimpleNamespace(params=params)


def crossed(dtypes, shapes, name="test_a"):
    return [
        Item(name, dtype=dtype, out_dtype=dtype, shape=shape, bias=bias)
        for dtype, shape, bias in itertools.product(range(dtypes), range(shapes), (True, False))
    ]


@pytest.mark.parametrize(("dtypes", "shapes"), [(5, 6), (5, 1), (2, 3), (4, 2)])
def test_every_dtype_and_every_shape_is_left_once(dtypes, shapes):
    items = crossed(dtypes, shapes)
    left = [item.params for item in items if item not in off_the_diagonal(items)]
    assert len(left) == max(dtypes, 2 * shapes)
    assert {params["dtype"] for params in left} == set(range(dtypes))
    assert len({(params["shape"], params["bias"]) for params in left}) == 2 * shapes


def test_what_is_not_crossed_is_left():
    of_dtypes = [Item("test_a", dtype=number) for number in range(5)]
    of_shapes = [Item("test_b", shape=[number], seed=-number) for number in range(5)]
    assert not off_the_diagonal([*of_dtypes, *of_shapes, Item("test_c")])
