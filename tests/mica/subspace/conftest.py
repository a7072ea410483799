"""What lets small matrices stand for large ones."""

import pytest

from mica.subspace import eigen


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Asked for by every test of this folder."""


@pytest.fixture(autouse=True)
def both_eigensolvers(monkeypatch):
    """Small sides of 140 and 150 go through the partial eigensolver, those of 40 and 60 do not."""
    monkeypatch.setattr(eigen, "FULL_BELOW", 128)
