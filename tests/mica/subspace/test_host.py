"""The Gram matrix on the CPU: its memory; test_gram.py and test_krylov.py have its numbers."""

import platform

import pytest

from tests.support.processes import printed_by

PROGRAM = """
import resource
import torch
from mica import minor_subspace

torch.set_num_threads(1)
weight = torch.randn(576, 576)
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    minor_subspace(weight, 16)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_what_a_solution_has_freed_serves_the_next_one():
    """A square weight, whose arrays of 648 pages each are all of one size: glibc gave them all back."""
    assert int(printed_by(PROGRAM)) < 100
