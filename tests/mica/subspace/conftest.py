"""What lets small matrices stand for large ones, and the CPU for an accelerator."""

import pytest

from mica.subspace import device, gram, krylov
from mica.subspace.cache import SubspaceCache


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Asked for by every test of this folder."""


@pytest.fixture(autouse=True)
def _small_krylov(monkeypatch):
    """Krylov subspaces are judged from the first block on, so that they fit small sides from 128 on."""
    monkeypatch.setattr(krylov, "FIRST_CHECK", 1)


@pytest.fixture
def cache(tmp_path):
    return SubspaceCache(tmp_path / "not" / "there yet")


@pytest.fixture
def accelerated(monkeypatch):
    """Weights on the CPU are taken for an accelerator's: batched by shape."""
    monkeypatch.setattr(device, "ON_HOST", ())


@pytest.fixture
def blocks_of(monkeypatch):
    """blocks_of(rows, elements): of those in which weights are read from now on."""

    def changed(rows, elements=1):
        monkeypatch.setattr(gram, "BLOCK_ROWS", rows)
        monkeypatch.setattr(gram, "BLOCK_ELEMENTS", elements)

    return changed


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
