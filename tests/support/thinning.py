"""Compiled on a device, a test of every shape with every dtype takes half a second a variant: fewer of them.

The interpreter's run is complete: a combination costs milliseconds there, and kernels compute the same. What
only a device shows (instructions, layouts of registers, narrow accesses) hangs on the shape and on the dtype,
hardly on the pair.
"""

import os

import pytest

ON_DEVICE = "MICA_TEST_DEVICE" in os.environ


def off_the_diagonal(items: list[pytest.Item]) -> set[pytest.Item]:
    """What a device need not run: of each test parametrised by dtypes and by more, all but a diagonal.

    Each combination of dtypes is left, and each combination of the other parameters.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {item for group in tests.values() for item in _off_the_diagonal(group)}


def _off_the_diagonal(items: list[pytest.Item]) -> list[pytest.Item]:
    taken = [_taken(item) for item in items]
    rows, columns = (
        {key: n for n, key in enumerate(dict.fromkeys(keys))} for keys in zip(*taken, strict=True)
    )
    count = min(len(rows), len(columns))
    placed = zip(items, taken, strict=True)
    return [item for item, (row, column) in placed if rows[row] % count != columns[column] % count]


def _taken(item: pytest.Item) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which dtypes a test takes, and what of everything else; by their words, for not all can be hashed."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    dtypes = tuple(repr(value) for name, value in params.items() if name.endswith("dtype"))
    return dtypes, tuple(repr(value) for name, value in params.items() if not name.endswith("dtype"))
