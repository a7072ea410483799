"""`.ci/run` has all checks of the Makefile."""

import re

from tests.support.imports import ROOT


def test_every_check_of_the_makefile_has_its_rhythm():
    """But what a test of another name contains, and what is no check."""
    targets = set(re.findall(r"^([a-z-]+): \$\(READY\)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    run = set(re.findall(r"make ([a-z-]+)", (ROOT / ".ci/run").read_text()))
    others = {"demo", "test-all", "bench", "gpu-dry-run"}
    assert targets - run == others
    assert run <= targets
