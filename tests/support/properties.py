"""Hypothesis, or skipped tests where it is not installed, as on a separate GPU machine."""

import os
from unittest.mock import Mock

import pytest

EXAMPLES = 3 if "MICA_TEST_DEVICE" in os.environ else 20  # nearly each is a variant of a kernel to compile

try:
    from hypothesis import Phase, given, settings
    from hypothesis import strategies as st

    # No deadline: the first example compiles or warms up. Derandomised: a red run is red again.
    # A mutant needs no smallest example, and the search for one takes minutes of interpreted kernels.
    unread = {Phase.shrink, Phase.explain} if os.environ.get("MICA_TESTS_SHRINK") == "0" else set()
    phases = [phase for phase in Phase if phase not in unread]
    settings.register_profile(
        "kernels", deadline=None, derandomize=True, max_examples=EXAMPLES, database=None, phases=phases
    )
    settings.load_profile("kernels")
except ImportError:
    st = Mock()

    def given(**strategies):
        return pytest.mark.skip(reason="hypothesis is not installed")


__all__ = ["given", "st"]
