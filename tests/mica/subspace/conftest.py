"""What lets small matrices stand for large ones."""

import pytest
import torch

from mica.subspace import batched, krylov
from mica.subspace.cache import SubspaceCache


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Asked for by every test of this folder."""


@pytest.fixture(autouse=True)
def _small_krylov(monkeypatch):
    """Krylov subspaces are judged from the first block on, so that they fit small sides from 128 on."""
    monkeypatch.setattr(krylov, "FIRST_CHECK", 1)


@pytest.fixture
def weight():
    return torch.randn(24, 30)


@pytest.fixture
def cache(tmp_path):
    return SubspaceCache(tmp_path / "not" / "there yet")


@pytest.fixture
def weak_fp64(monkeypatch):
    """Of every device: fp32 products are tried."""
    monkeypatch.setattr(batched, "has_weak_fp64", lambda device: True)


@pytest.fixture
def calls_of(monkeypatch):
    """calls_of(owner, name): the positional arguments of each call of that function from now on."""

    def recorded(owner, name):
        calls, function = [], getattr(owner, name)

        def recording(*arguments, **options):
            calls.append(arguments)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, recording)
        return calls

    return recorded
