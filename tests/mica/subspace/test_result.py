"""A result cut to a smaller rank is certified only where all of it was."""

from dataclasses import replace

import pytest
import torch

from mica.subspace import minor_subspace
from mica.subspace.result import is_certified, narrowed


@pytest.fixture
def stored():
    return minor_subspace(torch.randn(60, 40), 8)


@pytest.mark.parametrize("rank", [3, 8])
def test_the_last_columns(stored, rank):
    kept = narrowed(stored, rank)
    assert torch.equal(kept.basis, stored.basis[:, -rank:])
    assert torch.equal(kept.singular_values, stored.singular_values[-rank:])
    assert kept.certified


def test_what_was_not_proven_or_not_determined_proves_nothing(stored):
    assert narrowed(replace(stored, certified=False), 3) is None
    assert narrowed(replace(stored, null_count=2), 3) is None


def test_the_allowance_is_a_share_of_the_energy_and_a_resolution_a_vector():
    assert is_certified(1e-5 * 7 + 3 * 0.1, 7, 3, 0.1)
    assert not is_certified(1.01e-5 * 7 + 3 * 0.1, 7, 3, 0.1)
    assert is_certified(8e-3, 0.0, 8, 1e-3)
    assert not is_certified(8.01e-3, 0.0, 8, 1e-3)
    excess, energies = torch.tensor([2e-5, 2e-5]), torch.tensor([1.0, 3.0])
    assert is_certified(excess, energies, 1, torch.tensor([0.0, 0.0])).tolist() == [False, True]
