"""A cell in one call: for a comparison that needs no file of its own kind (`bench/METHOD.md`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
from torch import Tensor

from bench.measure.clocks import seconds
from bench.suites.harness import build_all, iterations
from tests.support.tolerances import RELATIVE, error


def case(
    name: str,
    axes: Mapping[str, str | int],
    calls: Mapping[str, Callable[[], Tensor]],
    expected: Mapping[str, Callable[[], Tensor]],
    rounds: int = 7,
) -> Callable:
    """A test for pytest to collect, in which the implementations of this cell take turns.

    ``calls``: implementation -> what is timed, the fastest first: it decides how many calls make a sample;
    ``expected``: implementation -> what its call must return, or it gets no number.
    """

    def checked(implementation: str) -> Callable[[], Tensor]:
        call = calls[implementation]
        if implementation in expected:
            check_error(call(), expected[implementation]())
        return call

    @functools.cache
    def setting() -> tuple[dict[str, Callable], int]:
        built = build_all(name, calls, checked)
        fastest = next(iter(built.values()))
        return built, iterations(seconds(fastest))

    @pytest.mark.parametrize("implementation", calls)
    @pytest.mark.parametrize("round_", range(rounds))
    def bench(once, gated, round_, implementation):
        built, count = gated(name, setting, implementation)
        once(built[implementation], name, implementation, dict(axes), count, all_clocks=True)

    return bench


def check_error(result: Tensor, truth: Tensor) -> None:
    """Raises AssertionError where a result is further from the truth than its dtype explains."""
    relative = error(result, truth)
    limit = RELATIVE[result.dtype]
    assert relative <= limit, f"the relative error is {relative:.2e}, above {limit:.0e}"
