"""A cell in one call: for a comparison that needs no file of its own kind (`bench/METHOD.md`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.measure.clocks import seconds
from bench.suites.harness import build_all, iterations
from bench.suites.rounds import Once, prepared, rounds
from tests.support.tolerances import RELATIVE, error


def case(
    name: str,
    axes: Mapping[str, str | int],
    calls: Mapping[str, Callable[[], Tensor]],
    expected: Mapping[str, Callable[[], Tensor]],
) -> Callable:
    """A test for pytest to collect, in which the implementations of this cell take turns.

    ``calls``: implementation -> what is timed, the fastest first: it decides how many calls make a sample;
    ``expected``: implementation -> what its call must return, or it gets no number.
    """

    def checked(implementation: str) -> Callable[[], Tensor]:
        call = calls[implementation]
        if implementation in expected:
            result = call()
            check_error(result, expected[implementation](), result.dtype)
        return call

    def setting() -> tuple[dict[str, Callable], int]:
        built = build_all(name, calls, checked)
        fastest = next(iter(built.values()))
        return built, iterations(seconds(fastest))

    def bench():
        built, count = prepared(name, setting)

        def sample(once: Once, implementation: str) -> None:
            once(built[implementation], dict(axes), count, all_clocks=True)

        rounds(name, calls, sample)

    return bench


def check_error(result: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Raises AssertionError where a result is further from the truth than rounding to ``dtype`` explains."""
    relative = error(result, truth)
    limit = RELATIVE[dtype]
    assert relative <= limit, f"the relative error is {relative:.2e}, above {limit:.0e}"
