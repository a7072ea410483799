"""What lets small matrices stand for large ones."""

import pytest

from mica.subspace import krylov


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Asked for by every test of this folder."""


@pytest.fixture(autouse=True)
def _small_krylov(monkeypatch):
    """Krylov subspaces are judged from the first block on, so that they fit small sides from 128 on."""
    monkeypatch.setattr(krylov, "FIRST_CHECK", 1)
