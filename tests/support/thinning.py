"""Thins out tests of shapes × dtypes on a device, where compiling takes half a second per variant.

The interpreter runs all of them: a combination costs milliseconds there, and kernels compute the same. What
only a device shows (instructions, register layouts, narrow accesses) depends on the shape and on the dtype,
hardly on the pair.
"""

import os

import pytest

ON_DEVICE = "MICA_TEST_DEVICE" in os.environ


def off_the_diagonal(items: list[pytest.Item]) -> set[pytest.Item]:
    """What a device need not run: all but a diagonal of each test parametrised by dtypes and others.

    Each combination of dtypes remains, and each combination of the other parameters.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {item for group in tests.values() for item in _off_the_diagonal(group)}


def _off_the_diagonal(items: list[pytest.Item]) -> list[pytest.Item]:
    taken = [_parameters(item) for item in items]
    rows, columns = (
        {key: n for n, key in enumerate(dict.fromkeys(keys))} for keys in zip(*taken, strict=True)
    )
    count = min(len(rows), len(columns))
    placed = zip(items, taken, strict=True)
    return [item for item, (row, column) in placed if rows[row] % count != columns[column] % count]


def _parameters(item: pytest.Item) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A test's dtypes, and its other parameters; by repr, since not all can be hashed."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    dtypes = tuple(repr(value) for name, value in params.items() if name.endswith("dtype"))
    return dtypes, tuple(repr(value) for name, value in params.items() if not name.endswith("dtype"))
